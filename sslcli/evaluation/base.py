"""Interface of evaluation protocols: the base classes of protocols, and the outcome that a protocol returns.

Protocol            is called once with all networks, and may train copies of the networks
FeatureProtocol     uses only frozen features; subclasses define `measure`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from sslcli.data.sources.base import Source
from sslcli.errors import ConfigError, class_name
from sslcli.evaluation import layers
from sslcli.evaluation.features import FeatureSet, computed
from sslcli.evaluation.network import Classifier
from sslcli.evaluation.task import Start, Task
from sslcli.report.console import SUBJECTS, Progress

OnProgress = Callable[[int], None]  # argument: units of work completed since the last call


def ignore_progress(done: int) -> None:
    """Ignore a progress report. This function is the default of `on_progress`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a protocol.

    Attributes:
        result: JSON-serializable values. The keys include protocol (name), split, top1, interval (the 95 % confidence
            interval [low, high] of top1), n_train, n_test, num_classes, and baselines (name -> values with at least
            top1 and interval).
        net: a trained network to save, or None. protocol=distill can use it as the teacher.
        positions: (n,) indices, in the evaluated dataset, of the labeled images on which `net` was trained.
        files: further text files to write: name -> content.
        variant: a suffix for the result's name that is known only after the evaluation, or "". It is placed before the
            suffix from `Protocol.variant`. For a suffix that depends only on settings, override `Protocol.variant`.
    """

    result: dict[str, Any]
    net: Classifier | None = None
    positions: Tensor | None = None
    files: dict[str, str] = field(default_factory=dict)
    variant: str = ""


def trained_and_measured(result: Mapping[str, Any]) -> str:
    """Return text with the number of images used for training and the number of images used to measure the accuracy.

    An example is "trained on 50,000 training images, measured on 10,000 images of test".
    """
    counts = {key: f"{result[key]:,} " if key in result else "" for key in ("n_train", "n_test")}
    return (
        f"trained on {counts['n_train']}training images, measured on {counts['n_test']}images of {result['split']}"
        + ("" if result["split"] == "test" else ", which are not the test images of publications")
    )


def check_outcome(outcome: Outcome, protocol: object) -> None:
    """Raise ConfigError unless the fields of an outcome have the types and keys that `Outcome` requires."""
    who = class_name(type(protocol))
    if not isinstance(outcome, Outcome) or not isinstance(outcome.result, dict):
        raise ConfigError(f"{who} returned {outcome!r}, but it must return an Outcome with a result dictionary")
    result = outcome.result
    for name in ("protocol", "split", "top1", "interval"):
        if name not in result:
            raise ConfigError(f"the result of {who} has no {name!r}: it needs protocol, split, top1 and interval")
    for name in (result["protocol"], outcome.variant or "x", *outcome.files):
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ConfigError(f"the result of {who} is named {name!r}, but a name has only letters, digits and . _ + -")
    numbers = [result["top1"], *result["interval"]]
    if not all(isinstance(number, (int, float)) and 0 <= number <= 1 for number in numbers):
        raise ConfigError(f"the result of {who} has the accuracy and interval {numbers}, but they must be in [0, 1]")
    try:
        json.dumps(result)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the result of {who} cannot be written as JSON: {error}") from error


def described(protocol: Protocol, result: Mapping[str, Any]) -> str:
    """Return `Protocol.description` for a result. Raises ConfigError unless it is one line of text."""
    found = protocol.description(result)
    if not isinstance(found, str) or not found or "\n" in found:
        raise ConfigError(
            f"description of {class_name(type(protocol))} returned {found!r}, but it must return one line of text"
        )
    return found


def shares_work(protocol: Protocol) -> bool:
    """Return True if the class of the protocol itself sets `shares_work`, see `Protocol`."""
    return bool(vars(type(protocol)).get("shares_work", False))


class Protocol:
    """Base class of a protocol, selected by `protocol=...` and instantiated from its yaml file.

    This class declares every member that `ssl-eval` uses. The commands instantiate only subclasses of this class, so a
    configuration cannot call arbitrary code. The constructor raises ValueError if a setting is invalid.

    Attributes:
        title: the name of the protocol in the progress bar.
        baselines: names of the baselines, which are evaluated in addition to the trained network if baselines=true.
            "random" is the network before training. "pixels" has no network and uses the pixels as features.
        trains_on_val: True if the protocol may train on the labels of the split "val" when it reports on "test". In
            this case, `FeatureSet.val` is None, so the protocol cannot select hyperparameters on "val". If it has
            hyperparameters to select, it must hold out a part of its training images for the selection.
        trains: True if the protocol trains copies of the networks. The networks and their features then stay in memory
            during the whole evaluation.
        shares_work: True if all processes of an evaluation call the protocol, which divides its work among them with
            `sslcli.distributed.shared_work`. All processes must then access the same items of `starts` in the same
            order, outside of `spread`. False if only rank 0 calls the protocol. Subclasses do not inherit the value,
            because their own code may not divide its work.
    """

    title: ClassVar[str] = "evaluation"
    baselines: ClassVar[tuple[str, ...]] = ("random",)
    trains_on_val: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    shares_work: ClassVar[bool] = False

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Evaluate the networks in `starts`. The keys are "trained" and the names of the baselines.

        An implementation must select all hyperparameters before it uses the reported split (`FeatureSet.reported`).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    @classmethod
    def defaults(cls, monitor: Mapping[str, Any]) -> dict[str, Any]:
        """Return default values for settings that are null in the yaml.

        `monitor` contains the settings `monitor.*` of the run.
        """
        return {}

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the result's name if the protocol's settings change the measured quantity, else "".

        A new result replaces an older result of the same name. Results of different quantities therefore need different
        suffixes. `monitor` contains the settings `monitor.*` of the run.
        """
        return ""

    def description(self, result: Mapping[str, Any]) -> str:
        """Return how the accuracy in `result` was measured and with which accuracies it can be compared, in one line.

        `result` is `Outcome.result` of the trained network. `ssl-eval` prints the line below the accuracy, and stores
        it in the result file.
        """
        return f"{self.title}, {trained_and_measured(result)}: comparable only with the same protocol and settings"

    def training_positions(self, source: Source, monitor: Mapping[str, Any]) -> Tensor:
        """Return the positions (n,) of the training images to use.

        The default is all training images except those of "val" and "test". If `trains_on_val` is True, only the images
        of the reported splits are excluded. `monitor` contains the settings `monitor.*` of the run.
        """
        excluded = self.reported_splits(source.nonempty_splits()) if self.trains_on_val else ("val", "test")
        return source.without_labels_of(*excluded)

    def query_positions(self, source: Source, split: str, monitor: Mapping[str, Any]) -> Tensor:
        """Return the positions (n,) of the images of `split`, one of the reported splits, that are evaluated.

        The default is all images of the split. `monitor` contains the settings `monitor.*` of the run.
        """
        return source.splits[split]

    def reported_splits(self, splits: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the names of the splits on which accuracies are reported.

        `splits` contains all splits of the dataset: name -> positions (n,) of the images.
        """
        return ("test" if "test" in splits else "val",)

    def choose_layer(self, feature_layer: str, net: nn.Module, images: Tensor) -> tuple[str, str]:
        """Return the layer to use for the setting `feature_layer`, and the default layer.

        The name of a result contains the layer only if it is not the default layer. `images` (2, C, H, W) is an example
        input of `net`. Raises ConfigError if the protocol cannot use the layer.
        """
        return feature_layer, layers.BACKBONE


def outcome_of(
    measure: Callable[[str], dict[str, Any]], names: Iterable[str], task: Task, *, kept: Callable[[str], bool]
) -> Outcome:
    """Return the outcome of a protocol that measures each network on its own. Results of baselines are cached.

    Args:
        measure: function that returns the result of the network with this name: "trained" or the name of a baseline.
        names: the names of all networks.
        task: the task, which caches the results of baselines.
        kept: whether a key of the result of a baseline is stored.
    """

    def numbers(name: str) -> dict[str, Any]:
        return {key: value for key, value in measure(name).items() if kept(key)}

    result = measure("trained")
    baselines = {name: task.kept(name, partial(numbers, name)) for name in names if name != "trained"}
    return Outcome(result=result | ({"baselines": baselines} if baselines else {}))


class FeatureProtocol(Protocol):
    """Base class of a protocol that computes its result from frozen features. Subclasses define `measure`.

    Attributes:
        progress_units: number of units of work that `measure` reports to the progress bar; 0 = no progress bar.
    """

    baselines = ("pixels", "random")
    trains = False

    @property
    def progress_units(self) -> int:
        return 0

    def measure(self, features: FeatureSet, *, on_progress: OnProgress = ignore_progress) -> dict[str, Any]:
        """Return the result for the features of one network: all keys of `Outcome.result` except "baselines"."""
        raise NotImplementedError(f"{type(self).__name__} does not define measure")

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Call `measure` with the features of every network in `starts`: the trained network and the baselines.

        Results of baselines are cached, because they are the same for all checkpoints of a run.
        """

        return outcome_of(
            lambda name: self._measured(name, starts[name], task),
            starts,
            task,
            kept=lambda key: "top" in key or "interval" in key,
        )

    def _measured(self, name: str, start: Start, task: Task) -> dict[str, Any]:
        if not self.progress_units:
            return self._checked(computed(self.measure, start.features, task.device))
        progress = Progress(task.screen, f"{self.title}, {SUBJECTS[name]}", total=self.progress_units)
        try:
            return self._checked(computed(self.measure, start.features, task.device, on_progress=progress))
        finally:
            task.screen.stop()

    def _checked(self, found: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(found, dict):
            raise ConfigError(
                f"measure of {type(self).__qualname__} returned {found!r}, but it must return a dictionary"
            )
        return found
