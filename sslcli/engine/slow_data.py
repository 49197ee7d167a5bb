"""Detection of training that waits for images most of the time."""

from __future__ import annotations

PERIOD = 60.0  # seconds of training over which the fraction is measured
LIMIT = 0.5  # a run is reported if it waits for images during more than this fraction of the time


class SlowData:
    """Detector of training that waits for images during more than the fraction `limit` of the time.

    Call `update` once for each interval between two logs. The first interval is ignored, because the data workers start
    in it.

    Args:
        period: the fraction of waiting time is measured over at least this many seconds of training. Therefore short
            runs and single slow reads are not reported.
        limit: the fraction in [0, 1] above which the waiting is reported.
    """

    def __init__(self, *, period: float = PERIOD, limit: float = LIMIT) -> None:
        self.period, self.limit = period, limit
        self._started = self._reported = False
        self._spent = self._waited = 0.0

    def update(self, spent: float, waited: float) -> float | None:
        """Add an interval between two logs. Return the fraction of waiting time if it must be reported, else None.

        The fraction is computed when the intervals since the last computation have lasted `period` seconds. It must be
        reported if it is above `limit`. After the first report, the result is always None.

        Args:
            spent: seconds of the interval, without evaluation.
            waited: seconds of the interval in which the steps waited for images.
        """
        if not self._started or self._reported:
            self._started = True
            return None
        self._spent += spent
        self._waited += waited
        if self._spent < self.period:
            return None
        fraction = min(1.0, self._waited / self._spent)
        self._spent = self._waited = 0.0
        self._reported = fraction > self.limit
        return fraction if self._reported else None


def faster_data(*, workers: int, cores: int, in_memory: bool, can_cache: bool) -> str:
    """Return advice on how to make the images of a run arrive faster.

    Args:
        workers: data workers of each process.
        cores: processor cores of each process.
        in_memory: True if the dataset is in memory. The training process then computes the crops itself.
        can_cache: True if the dataset can cache decoded images, but the cache is not enabled.
    """
    if in_memory:
        return "Views are computed by the training process: choose views without blur, or give the run more cores"
    found: list[str] = []
    if workers < cores - 1:
        found.append(f"set dataset.workers={cores - 1} (now {workers}, with {cores} cores per process)")
    if can_cache:
        found.append("keep decoded images with dataset.keep_decoded=ram")
    found.append("store the images at a smaller size or on a local disk")
    return f"To get images faster, {', or '.join(found)}"
