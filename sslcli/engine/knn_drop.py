"""Detection of a run that destroys its initial weights: the online k-NN accuracy falls far below that at step 0."""

from __future__ import annotations

from collections.abc import Mapping

from sslcli.report.console import percent

MAX_DROP = 0.05  # of the accuracy, as a fraction of the images
NAMES = ("knn_top1", "test_knn_top1")  # accuracies of the online k-NN, see `sslcli.evaluation.online.knn_probe`


class KnnDrop:
    """Compares the k-NN accuracy of a run with initial weights (`init`) with the accuracy at step 0.

    Attributes:
        start: accuracy at step 0. None if it was not measured, or if the warning was already given.
    """

    def __init__(self) -> None:
        self.start: float | None = None

    def warning(self, step: int, scalars: Mapping[str, float]) -> str | None:
        """Return a warning at the first `step` whose accuracy is more than `MAX_DROP` below that at step 0, else None.

        `scalars` are those of the online k-NN. Those of step 0 set `start`.
        """
        accuracy = next(scalars[name] for name in NAMES if name in scalars)
        if step == 0:
            self.start = accuracy
        if self.start is None or not self.start - accuracy > MAX_DROP:
            return None
        before, self.start = self.start, None
        return (
            f"the k-NN accuracy fell from {percent(before)} at step 0, with the weights of init, to "
            f"{percent(accuracy)} at step {step:,}: the training replaces the initial features. If the accuracy does "
            "not recover, use a lower optimizer.lr, a longer train.warmup_epochs, or train the heads first with "
            "train.freeze_backbone_epochs=1"
        )
