"""Shared parts of the protocols that train a network: recipe, training loop and predictions.

    labeled images -> Loader (crop, flip) -> Classifier -> loss -> SGD or AdamW, cosine schedule per step

The labeled images are given by their positions, which are indices in the source of the images. Every training starts
from a copy of the same network. The order of the images, their random crops and flips, and random numbers in the
network (dropout) depend only on the seed. Two trainings with the same seed, machine and number of threads have
bit-identical results.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from sslcli.data.loader import Loader
from sslcli.data.views.spec import View
from sslcli.data.views.views import Views
from sslcli.distributed.devices import unchanged_random_state
from sslcli.engine import precision
from sslcli.errors import ConfigError
from sslcli.evaluation import layers
from sslcli.evaluation.base import Protocol
from sslcli.evaluation.features import computed_on, extract
from sslcli.evaluation.linear import Linear
from sslcli.evaluation.network import Classifier, parameter_groups, set_mode
from sslcli.evaluation.result import accuracy, bootstrap_interval, top5
from sslcli.evaluation.task import Task
from sslcli.evaluation.variants import suffix
from sslcli.methods.base import Batch
from sslcli.nn import schedule
from sslcli.nn.modes import evaluating
from sslcli.report.console import Progress

OPTIMIZERS = ("sgd", "adamw")
BATCH_NORMS = ("train", "eval")
LOOK = 20  # steps between checks for a finite loss
Loss = Callable[[Classifier, Batch], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe(Protocol):
    """Base class of protocols that train, with their hyperparameters. Raises ValueError if a value is out of range.

    Attributes:
        named: the settings that can be part of the result's name, as setting -> value in the yaml file. A setting with
            the value of the yaml file is left out of the name, see `sslcli.evaluation.variants`.
    """

    named: ClassVar[dict[str, Any]] = {}

    optimizer: str = "sgd"
    weight_decay: float = 0.0
    momentum: float = 0.9
    layer_decay: float = 1.0
    steps: int = 350
    batch_size: int = 128
    warmup: float = 0.0
    crop_scale: Sequence[float] | None = (0.3, 1.0)
    flip: float = 0.5
    batch_norm: str = "train"
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("batch_norm", self.batch_norm, BATCH_NORMS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: choose {' or '.join(known)}")
        for name in ("steps", "batch_size", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0")
        if not 0 <= self.momentum < 1 or not 0 <= self.warmup < 1:
            raise ValueError(f"momentum={self.momentum} and warmup={self.warmup} must be in [0, 1)")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"layer_decay={self.layer_decay} must be above 0 and at most 1: 0.65 to 0.75 for a ViT, 1 is off"
            )
        self.view()  # check the settings before features are extracted

    def choose_layer(self, feature_layer: str, net: nn.Module, images: Tensor) -> tuple[str, str]:
        """Return two names of layers: the layer on which the classifier is trained, and the default layer.

        The first name is `feature_layer`. The default layer is the output of the backbone. Raises ConfigError if
        `feature_layer` is "bank", the embeddings in the memory bank.
        """
        if feature_layer == layers.BANK:
            raise ConfigError("feature_layer is 'bank', which cannot be trained: use protocol=knn, knn_full or linear")
        return feature_layer, layers.BACKBONE

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the result's name: the settings that differ from their defaults.

        Only the settings in the class attribute `named`, which contains their defaults, are part of the suffix.
        """
        return suffix(self, self.named)

    def view(self) -> View:
        """Return the training augmentation."""
        scale = None if self.crop_scale is None else tuple(self.crop_scale)
        return View(crop_scale=scale, flip=self.flip)  # type: ignore[arg-type]

    def views(self, task: Task) -> Views:
        """Return the training augmentation with the color space and normalization of pre-training."""
        return views_of(task, self.view())

    def solver(self, classifier: Classifier, *, lr: float) -> Optimizer:
        """Return the optimizer for the parameters of `classifier`, which include the parameters of its network.

        Each parameter group has a factor `lr_scale` for the learning rate, see `parameter_groups`.
        """
        groups = parameter_groups(classifier, layer_decay=self.layer_decay, weight_decay=self.weight_decay)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=(self.momentum, 0.999))
        return torch.optim.SGD(groups, lr=lr, momentum=self.momentum, nesterov=self.momentum > 0)

    def numbers(self, place: Tensor, num_classes: int) -> dict[str, Any]:
        """Return the top-1 accuracy, the top-5 accuracy, and the confidence interval of the top-1 accuracy.

        `place` (m,) contains the rank of each image's true class among the predictions; 0 is the best rank.
        """
        interval = bootstrap_interval(place == 0, seed=self.seed, resamples=self.resamples)
        return {"top1": accuracy(place, 1), "top5": top5(place, num_classes), "interval": list(interval)}

    def facts(self) -> dict[str, Any]:
        """Return the seed and the training transform, for the result file."""
        return {"seed": self.seed, "train_transform": self.view().describe()}


def views_of(task: Task, view: View) -> Views:
    """Return the augmentation `view` with the color space and normalization of pre-training."""
    views = copy.copy(task.views)
    views.entries = views.views = [view]
    return views


def batches(task: Task, positions: Tensor, views: Views, *, batch_size: int, seed: int) -> Loader:
    """Return the loader of training batches of the images at `positions` (n,) of the source.

    If `batch_size` is larger than n, the batches have n images.
    """
    part = copy.copy(task.source)
    part.splits, part.weights = {"train": positions}, None
    part.mean, part.std = tuple(task.mean), tuple(task.std)
    if task.workers is not None:
        part.workers, part.chooses_workers = task.workers, False
    size = min(batch_size, len(positions))
    return Loader(part, views, batch_size=size, accumulate=1, seed=seed, device=task.device)


def cross_entropy(classifier: Classifier, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a labeled batch."""
    return F.cross_entropy(classifier(batch.views[0]).float(), batch.label)


def fit(
    classifier: Classifier,
    task: Task,
    positions: Tensor,
    recipe: Recipe,
    *,
    lr: float,
    seed: int,
    progress: Progress,
    loss: Loss = cross_entropy,
    facts: str = "",
) -> None:
    """Train `classifier` in place on the images of the dataset `task.source` at the indices `positions` (n,).

    At least two images are needed: n >= 2.

    The training stops early if the loss is not finite. The loss is checked every `LOOK` steps. `facts` is text that the
    progress display shows.
    """
    if len(positions) < 2:
        raise ValueError(f"training needs at least 2 labeled images, got {len(positions)}: use more labels")
    optimizer = recipe.solver(classifier, lr=lr)
    scaler = precision.grad_scaler(task.device, task.precision)
    set_mode(classifier, batch_norm=recipe.batch_norm)
    warmup = round(recipe.warmup * recipe.steps)
    loader = batches(task, positions, recipe.views(task), batch_size=recipe.batch_size, seed=seed)
    with (
        unchanged_random_state(task.device),
        closing(loader.steps(0, recipe.steps)) as steps,
    ):
        torch.manual_seed(seed)  # for dropout and other noise of the network
        for step, (batch,) in enumerate(steps):
            for group in optimizer.param_groups:
                factor = schedule.warmup_cosine(step, total=recipe.steps, warmup=warmup)
                group["lr"] = lr * factor * group["lr_scale"]
            with precision.autocast(task.device, task.precision):
                value = loss(classifier, batch)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(value).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            if step % LOOK == LOOK - 1 and not bool(value.isfinite()):
                progress(recipe.steps - step, facts)
                return
            progress(1, facts)


def predict(classifier: Classifier, task: Task, positions: Tensor) -> Tensor:
    """Return the logits (n, num_classes) float32 of the images at `positions` (n,) of the source.

    The logits are computed in evaluation mode. The images are preprocessed by `Task.prepare`.
    """
    with evaluating(classifier):
        return outputs(classifier, task, positions).float()


def outputs(encode: Callable[[Tensor], Tensor], task: Task, positions: Tensor) -> Tensor:
    """Return the outputs (n, D) of `encode` for the images at `positions` (n,) of the source, see `extract`."""
    return extract(
        encode,
        task.source,
        positions,
        prepare=task.prepare,
        batch_size=task.batch_size,
        device=task.device,
        precision=task.precision,
        workers=task.workers,
    )[0]


def warm(classifier: Classifier, features: Tensor, labels: Tensor, *, seed: int) -> dict[str, float]:
    """Initialize the classifier with a linear probe of frozen features (n, d). Return the probe's hyperparameters.

    The probe is computed on the device of the classifier.
    """
    fit_head = partial(Linear(seed=seed).head, num_classes=classifier.classify.out_features)
    found = computed_on(classifier.classify.weight.device, fit_head, features, labels)
    with torch.no_grad():
        classifier.classify.weight.copy_(found.weight)
        classifier.classify.bias.copy_(found.bias)
    return found.chosen
