"""Inputs of evaluation protocols: images, their preprocessing, and the networks to evaluate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.errors import ConfigError
from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.network import Classifier
from sslcli.report.console import Screen


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A network that an earlier evaluation fine-tuned.

    Attributes:
        net: the network with its classifier.
        positions: positions in the dataset of the labeled images on which it was trained.
        provenance: entries of the result file that state the origin of the network: the protocol that fine-tuned it,
            the file of the network, and the SHA-256 digest of this file.
    """

    net: Classifier
    positions: Tensor
    provenance: dict[str, Any]


def no_fine_tuned(name: str) -> FineTuned:
    """Raise ConfigError. This is the default of `Task.fine_tuned`, for tasks without saved fine-tuned networks.

    `name` is the name of an evaluation result. A fine-tuned network is saved together with its result.
    """
    raise ConfigError(f"there is no fine-tuned network {name!r}")


def compute(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return `measure()`, the result of the baseline `name`, without using a cache.

    This function is the default of `Task.kept`. `name` has no effect.
    """
    return measure()


@dataclass(frozen=True, kw_only=True)
class Task:
    """The images of an evaluation, their preprocessing, the progress display, and earlier results.

    Attributes:
        source: the labeled images.
        views: the views of pre-training. Only their color space and normalization are used.
        mean, std: normalization constants of pre-training, one value per channel.
        device, precision: device and precision of forward passes.
        batch_size: images per forward pass without gradient.
        workers: number of data workers; None = as set in the source.
        screen: progress display.
        fine_tuned: function that takes the name of an earlier result and returns the network saved with that result. It
            raises ConfigError if there is no such network.
        kept: function of two arguments: the name of a baseline, and a function that measures this baseline. If the
            cache contains the results of this baseline, they are returned. Otherwise, the baseline is measured.
    """

    source: Source
    views: Views
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    precision: str
    batch_size: int
    workers: int | None
    screen: Screen
    fine_tuned: Callable[[str], FineTuned] = no_fine_tuned
    kept: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]] = compute

    def prepare(self, images: Tensor) -> Tensor:
        """Convert images in [0, 1] to the color space and normalization of pre-training (the test transform)."""
        return self.views.finish(images, mean=self.mean, std=self.std)

    def example(self) -> Tensor:
        """Return two preprocessed black images, as an example input to inspect the network's outputs and gradients."""
        side = self.source.image_size
        return self.prepare(torch.zeros(2, self.source.channels, side, side, device=self.device))


@dataclass(frozen=True, kw_only=True)
class Start:
    """A network and its frozen features at one layer.

    A protocol evaluates the network, or trains a copy that starts from its weights.
    """

    net: nn.Module | None  # protocols train only copies of it; None: the features are pixels
    layer: str
    features: FeatureSet

    def classifier(self, task: Task, *, width: int | None = None) -> Classifier:
        """Return a copy of the network with a linear classifier on the features at `layer`.

        The classifier is initialized with zeros. `width` is the number of features at `layer`. None = the number of
        features in `features`.
        """
        assert self.net is not None
        return Classifier(
            copy.deepcopy(self.net),
            self.layer,
            width=self.features.train.shape[1] if width is None else width,
            num_classes=self.features.num_classes,
            images=task.example(),
        )
