"""Contract of evaluation protocols: what a protocol gets, what it returns, and the base classes to derive from.

Protocol            called once with all networks; may train copies of them
FeatureProtocol     sees frozen features only; define `measure`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from sslcli.data.sources.base import Source
from sslcli.evaluation import layers
from sslcli.evaluation.features import FeatureSet, computed
from sslcli.evaluation.network import Classifier
from sslcli.evaluation.task import Start, Task
from sslcli.report.console import SUBJECTS, Progress

OnProgress = Callable[[int], None]  # called with the number of units of work completed since the last call


def ignore_progress(done: int) -> None:
    """Do nothing with progress."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a protocol.

    Attributes:
        result: JSON-serializable values, among them protocol (its name), split, top1, interval [low, high] at 95 %,
            n_train, n_test, num_classes, and baselines (by name, with at least top1 and interval).
        net: a trained network to save, which protocol=distill can take as its teacher, or None.
        positions: (n,) positions in their source of the labeled images that `net` was trained on.
        files: further text files of the result: name -> content.
        variant: first part of the suffix of the result's name, if only the evaluation finds it out.
    """

    result: dict[str, Any]
    net: Classifier | None = None
    positions: Tensor | None = None
    files: dict[str, str] = field(default_factory=dict)
    variant: str = ""


class Protocol:
    """Base class of a protocol, selected by `protocol=...` and instantiated from its yaml file.

    Every member that `ssl-eval` uses is declared here. The commands instantiate only subclasses of this class, so a
    configuration cannot call arbitrary code. Invalid settings raise ValueError in the constructor.

    Attributes:
        title: the name of the work for the progress bar.
        baselines: the starts besides "trained" that the protocol evaluates if baselines=true: "random" is the network
            as initialized, "pixels" the images as features (a start without a network).
        trains: True if the protocol trains copies of the networks, so that several uses of a start's features follow
            one another and they are kept in memory.
    """

    title: ClassVar[str] = "evaluation"
    baselines: ClassVar[tuple[str, ...]] = ("random",)
    trains: ClassVar[bool] = True

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Evaluate "trained" and the baselines that are present in `starts`.

        The split to report (`FeatureSet.reported`) is used once, after all hyperparameters are selected.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    @classmethod
    def defaults(cls, monitor: Mapping[str, Any]) -> dict[str, Any]:
        """Return values of settings that are null, from the settings `monitor.*` of the run."""
        return {}

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the name of the result if settings make it another quantity than usual, else "".

        Two results with the same suffix have the same name, and the second replaces the first.
        """
        return ""

    def training_positions(self, source: Source, monitor: Mapping[str, Any]) -> Tensor:
        """Return the positions (n,) of the training images to use; by default all."""
        return source.splits["train"]

    def reported_splits(self, splits: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the names of the splits, of those present, on which accuracies are reported."""
        return ("test" if "test" in splits else "val",)

    def choose_layer(self, feature_layer: str, net: nn.Module, images: Tensor) -> tuple[str, str]:
        """Return the layer to use for the setting `feature_layer`, and the usual one, which no name mentions.

        `images` (2, C, H, W) are an example input of `net`. Raises ConfigError for a layer that cannot be used.
        """
        return feature_layer, layers.BACKBONE


class FeatureProtocol(Protocol):
    """Base class of a protocol that computes its result from frozen features: define `measure`.

    Attributes:
        progress_units: number of units of work that `measure` reports, for a progress bar; 0 = none.
    """

    baselines = ("pixels", "random")
    trains = False

    @property
    def progress_units(self) -> int:
        return 0

    def measure(self, features: FeatureSet, *, on_progress: OnProgress = ignore_progress) -> dict[str, Any]:
        """Return the result of one network's features, as `Outcome.result` without baselines."""
        raise NotImplementedError(f"{type(self).__name__} does not define measure")

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Measure the features of every start. Baselines are the same for all checkpoints of a run, so kept."""

        def numbers(name: str) -> dict[str, Any]:
            found = self._measured(name, starts[name], task)
            return {key: value for key, value in found.items() if "top" in key or "interval" in key}

        result = self._measured("trained", starts["trained"], task)
        baselines = {name: task.kept(name, partial(numbers, name)) for name in starts if name != "trained"}
        return Outcome(result=result | ({"baselines": baselines} if baselines else {}))

    def _measured(self, name: str, start: Start, task: Task) -> dict[str, Any]:
        if not self.progress_units:
            return computed(self.measure, start.features, task.device)
        progress = Progress(task.screen, f"{self.title}, {SUBJECTS[name]}", total=self.progress_units)
        try:
            return computed(self.measure, start.features, task.device, on_progress=progress)
        finally:
            task.screen.stop()
