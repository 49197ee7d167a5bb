"""Detection of representation collapse from the metrics of `sslcli.engine.health`, with a likely cause and remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping

# What an alarm means, its likely causes in order of likelihood, and the remedy.
_ADVICE = {
    "point": (
        "so all images have nearly the same embedding. Likely causes, the most likely first: no stop-gradient (the "
        "target embeddings are not detached), too high a learning rate, no predictor or a momentum encoder with EMA "
        "momentum 0, no BatchNorm in the heads, too high a temperature or no centering. Correct these in the method, "
        "or divide optimizer.lr by 3 and increase train.warmup_epochs"
    ),
    "crowd": (
        "so the embeddings fill only a small part of the sphere. Likely causes, the most likely first: no "
        "stop-gradient (the target embeddings are not detached), too high a learning rate, too high a temperature or "
        "no centering, too few negatives, no predictor or BatchNorm in the heads. Correct these in the method, or "
        "divide optimizer.lr by 3 and lower the temperature"
    ),
    "rank": (
        "so the embeddings use only a few directions (dimensional collapse). Likely causes, the most likely first: too "
        "high a learning rate or weight decay, a decorrelation or centering term with too small a weight, "
        "augmentations so strong that views share little. Divide optimizer.lr by 3, then weaken the augmentations"
    ),
    "assignments": (
        "so nearly all images have the same assignment to the prototypes: one prototype if the loss is near 0, all "
        "prototypes equally if it is near the logarithm of their number. Likely causes, the most likely first: no "
        "centering, too high a learning rate, a teacher momentum too low for the batch size, too high a teacher "
        "temperature. Correct these in the method, or divide optimizer.lr by 3 and increase train.warmup_epochs"
    ),
}
UNINFORMED = 0.002  # nats; the assignments of a network before training can be near this value
ADDED = {"uninformed": 0.0, "information": 0.0}  # entries that the state in checkpoints of version 0.2 lacks


class CollapseDetector:
    """Detector of representation collapse from the metrics of the embeddings.

    Call `update` after the first step, then at fixed intervals. A call is one measurement of the metrics of
    `sslcli.engine.health`. The peak of a metric is its largest value so far. The first measurement must be after the
    first step. A severe collapse can be complete after 50 steps. If the first measurement were later, the peaks would
    be too low.

    Any one of these conditions fires an alarm (d is the width of the embeddings):

        std           < 0.2 / sqrt(d)     and < half of its peak
        |uniformity|  < 0.5               and < a quarter of its peak
        rankme        < 5                 and < 10 % of its peak
        std           < 0.02 / sqrt(d)    in `patience` consecutive measurements, whatever its peak
        information   < 0.01              and < 5 % of its peak
        information   < 0.002             in 4 `patience` consecutive measurements, whatever its peak

    The information (`assignment_information`, in nats) is measured only for methods that assign images to prototypes.
    The embeddings of such a method may still differ when all images have the same assignment. Assignments of a healthy
    run may be nearly uniform in early training, so the last condition is slow.

    One measurement that is low, but not far below the peak, does not fire an alarm, because the embeddings of a healthy
    network without BatchNorm are nearly equal in early training. The limit of 5 for rankme is low, because embeddings
    that form ten separate clusters have a rank of about ten but have not collapsed.

    A collapse is reported after two consecutive alarms, because a single batch is not reliable. Alarms in the first
    `grace` measurements are ignored. `state_dict` contains the complete state. A resumed run therefore gives the same
    results as an uninterrupted run.
    """

    def __init__(self, *, grace: int = 2, patience: int = 10) -> None:
        if grace < 1 or patience < 1:
            raise ValueError(f"grace={grace} and patience={patience} must be at least 1 measurement")
        self.grace = grace
        self.patience = patience
        self._state = {"seen": 0.0, "alarms": 0.0, "stuck": 0.0, "std": 0.0, "spread": 0.0, "rankme": 0.0} | ADDED

    def update(self, values: Mapping[str, float], *, dim: int) -> str | None:
        """Add one measurement; return an explanation if the representation has collapsed, else None.

        `values` holds the metrics that `health.measure` returns for embeddings of width `dim`, and
        `assignment_information` if the method has assignments. A measurement with a non-finite value is ignored,
        because non-finite values are not a collapse.
        """
        std, spread, rank = values["std"], -values["uniformity"], values["rankme"]
        information = values.get("assignment_information", 0.0)
        if not all(math.isfinite(v) for v in (std, spread, rank, information)):
            return None
        state = self._state
        state["seen"] += 1
        for name, value in (("std", std), ("spread", spread), ("rankme", rank), ("information", information)):
            state[name] = max(state[name], value)
        state["stuck"] = state["stuck"] + 1 if std * math.sqrt(dim) < 0.02 else 0.0
        verdict = self._alarm(std, spread, rank, dim)
        if "assignment_information" in values:
            state["uninformed"] = state["uninformed"] + 1 if information < UNINFORMED else 0.0
            verdict = self._alarm_of_assignments(information) or verdict
        if state["seen"] <= self.grace or verdict is None:
            state["alarms"] = 0.0
            return None
        state["alarms"] += 1
        return verdict if state["alarms"] >= 2 else None

    def _alarm(self, std: float, spread: float, rank: float, dim: int) -> str | None:
        """Check the conditions of an alarm for one measurement. Return the message of the alarm, or None.

        Each metric is compared with a fixed limit and with its peak, the largest value so far.

        std: standard deviation of the normalized embeddings.
        spread: negative uniformity.
        rank: rankme.
        dim: width d of the embeddings.
        """
        peak = self._state
        limit = 0.2 / math.sqrt(dim)
        if (std < limit and std < 0.5 * peak["std"]) or peak["stuck"] >= self.patience:
            found = f"std of the normalized embeddings is {std:.2g}, below {limit:.2g} = 0.2/sqrt({dim})"
            return f"{found}, {_ADVICE['point']}"
        if spread < 0.5 and spread < 0.25 * peak["spread"]:
            return f"uniformity is {-spread:.2g}, above -0.5 (its best was {-peak['spread']:.2g}), {_ADVICE['crowd']}"
        if rank < 5 and rank < 0.1 * peak["rankme"]:
            return f"RankMe is {rank:.3g}, below 10 % of its maximum {peak['rankme']:.3g}, {_ADVICE['rank']}"
        return None

    def _alarm_of_assignments(self, information: float) -> str | None:
        """Check the conditions of an alarm for the information of the assignments. Return its message, or None."""
        peak = self._state["information"]
        if (information < 0.01 and information < 0.05 * peak) or self._state["uninformed"] >= 4 * self.patience:
            found = f"assignment_information is {information:.2g} nats (its maximum was {peak:.2g})"
            return f"{found}, {_ADVICE['assignments']}"
        return None

    def state_dict(self) -> dict[str, float]:
        """Return the peaks and the counters as floats."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a state that `state_dict` returned. Raises ValueError if `state` has missing or additional keys.

        Entries in `ADDED` may be missing, because an older version did not measure them.
        """
        state = ADDED | dict(state)
        if set(state) != set(self._state):
            raise ValueError(
                f"collapse detector state has {sorted(state)}, but needs {sorted(self._state)}: start a new run"
            )
        self._state = {name: float(value) for name, value in state.items()}
