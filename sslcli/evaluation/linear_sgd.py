"""Published linear protocol: a linear classifier on a frozen backbone, trained with SGD on random crops and flips.

Papers: MoCo (He et al. 2020, arXiv:1911.05722, section 4.1) and SimCLR (arXiv:2002.05709, appendix B.6). Official code
of MoCo: https://github.com/facebookresearch/moco/blob/main/main_lincls.py. Yaml: conf/protocol/linear_sgd.yaml.

    for images (N, 3, S, S), labels y (N,) in loader:        # random resized crop and flip, new at every step
        x = backbone(images)                                 # (N, d), frozen, evaluation mode, no gradient
        logits = x W                                         # (N, C) for each of G learning rates
        SGD step on cross-entropy(logits, y)

Sizes: N images per batch, d features, C classes, G learning rates, n training images.

Departures from the official code, which trains one classifier and reports the best epoch on the reported split:

- The classifiers of all learning rates are trained on the same features of the same crops. Each learning rate has two
  classifiers. One classifier skips the held-out part of the training images, and its accuracy on this part is used to
  select the learning rate. The other classifier is trained on all training images, and its accuracy is reported. The
  reported split is used once, after the last epoch.
- Weights are initialized with zeros instead of N(0, 0.01). The loss is convex, so its minimum does not depend on the
  initial weights.
- Learning rates are for 256 images and scaled by N / 256, as in MoCo v3:
  https://github.com/facebookresearch/moco-v3/blob/main/main_lincls.py#L178. With MoCo's N = 256, nothing changes.
- The cosine schedule is updated at every step instead of every epoch. The last incomplete batch of an epoch is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sslcli.data.views.spec import View
from sslcli.distributed import collectives
from sslcli.errors import ConfigError
from sslcli.evaluation import layers
from sslcli.evaluation.base import Outcome, Protocol, outcome_of, trained_and_measured
from sslcli.evaluation.finetune import reported_positions
from sslcli.evaluation.heads import Heads, SgdHeads, score
from sslcli.evaluation.random_crops import crop_features
from sslcli.evaluation.result import accuracy, best, bootstrap_interval, top5
from sslcli.evaluation.subsets import held_out
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.training import batches, views_of
from sslcli.evaluation.variants import suffix
from sslcli.nn.schedule import scale_lr, warmup_cosine, warmup_steps_down
from sslcli.report.console import SUBJECTS, Progress

SCHEDULES = ("cosine", "step")
FEATURE_NORMS = ("none", "batch_norm")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Trained linear classifiers on frozen features, two per learning rate.

    Attributes:
        reported: one classifier per learning rate, trained on all training images.
        selecting: one classifier per learning rate, trained without the held-out images, to select the learning rate.
        norm: module that maps features (n, d) to the input of the classifiers.
    """

    reported: Heads
    selecting: Heads
    norm: nn.Module


@dataclass(frozen=True, kw_only=True)
class LinearSgd(Protocol):
    """The protocol `linear_sgd`: linear classifiers are trained on random crops.

    The learning rate is selected on held-out training images. Then the accuracy on the reported split is measured.

    Raises ValueError if a value is out of range.
    """

    title: ClassVar[str] = "linear probe on random crops"
    trains_on_val: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    shares_work: ClassVar[bool] = True
    named: ClassVar[dict[str, Any]] = {
        "epochs": 100,
        "schedule": "cosine",
        "feature_norm": "none",
        "crop_scale": [0.08, 1.0],
        "flip": 0.5,
        "seed": 0,
    }

    lrs: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    feature_norm: str = "none"
    epochs: int = 100
    batch_size: int = 256
    schedule: str = "cosine"
    milestones: Sequence[float] = (0.6, 0.8)
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    crop_scale: Sequence[float] | None = (0.08, 1.0)
    flip: float = 0.5
    val_fraction: float = 0.1
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("feature_norm", FEATURE_NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose {' or '.join(known)}")
        if len(self.lrs) == 0 or not all(lr > 0 for lr in self.lrs):
            raise ValueError(f"lrs={list(self.lrs)} must contain at least one number, all above 0")
        for name in ("epochs", "batch_size", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not all(0 < at < 1 for at in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be fractions of the epochs between 0 and 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be in [0, 1): 0.9 is usual")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true needs a momentum above 0: 0.9 is usual")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be between 0 and 1: 0.1 is usual")
        self.view()  # check the settings before features are extracted

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the result's name.

        The class attribute `named` maps settings to the values of the yaml file. The suffix contains those settings
        of this protocol that have another value.
        """
        return suffix(self, self.named)

    def description(self, result: Mapping[str, Any]) -> str:
        """Return one line that names the published accuracies to which the accuracy in `result` can be compared."""
        return (
            f"linear classifier on a frozen backbone ({result['train_transform']}), {self.epochs} epochs, "
            f"{trained_and_measured(result)}: comparable with published linear accuracies of the same backbone, "
            "pre-training and crops"
        )

    def choose_layer(self, feature_layer: str, net: nn.Module, images: Tensor) -> tuple[str, str]:
        """Return two layers: the layer whose output the classifiers get, and the default layer.

        The first is `feature_layer`. The default layer is the output of the backbone. Raises ConfigError if
        `feature_layer` is "bank", the memory bank. The bank contains one embedding per image, but no features of random
        crops.
        """
        if feature_layer == layers.BANK:
            raise ConfigError(
                "feature_layer is 'bank', which has no features of random crops: use protocol=knn, knn_full or linear"
            )
        return feature_layer, layers.BACKBONE

    def view(self) -> View:
        """Return the training augmentation."""
        scale = None if self.crop_scale is None else tuple(self.crop_scale)
        return View(crop_scale=scale, flip=self.flip)  # type: ignore[arg-type]

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Train and evaluate the classifiers of each network in `starts`, one network after the other.

        The networks are the trained network and the baselines. Results of baselines are cached, because they are
        the same for all checkpoints of a run.
        """
        return outcome_of(
            lambda name: self.measure(name, starts[name], task),
            starts,
            task,
            kept=lambda key: key in ("top1", "top5", "interval", "chosen"),
        )

    def measure(self, name: str, start: Start, task: Task) -> dict[str, Any]:
        """Return the result of one network. Accuracies are fractions, and the interval is [low, high] at 95 %.

        `name` is the name of the network for the progress display: "trained" or "random".
        """
        data = start.features
        kept, out = self.split(data.train_labels)
        probe = self.train(name, start, task, kept if len(out) else None)
        grid, number = self.select(probe, data.train[out], data.train_labels[out], task)
        split, x_test, y_test = data.reported()
        place, _ = self.score(probe, probe.reported, x_test, y_test, task)
        correct = place[number] == 0
        return {
            "protocol": "linear_sgd",
            "split": split,
            "top1": accuracy(place[number], 1),
            "top5": top5(place[number], data.num_classes),
            "interval": list(bootstrap_interval(correct, seed=self.seed, resamples=self.resamples)),
            "chosen": {"lr": float(self.lrs[number])},
            "grid": grid,
            "n_train": len(data.train),
            "n_test": len(reported_positions(data)),
            "num_classes": data.num_classes,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "schedule": self.schedule,
            "feature_norm": self.feature_norm,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "train_transform": self.view().describe(),
        }

    def split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Split the training images into kept and held-out images, and return the rows of both.

        `labels` (n,) are the labels of the training images. The split is stratified by class. If there is only one
        learning rate, no image is held out.
        """
        rows = torch.arange(len(labels))
        if len(self.lrs) == 1:
            return rows, rows[:0]
        return held_out(rows, labels, fraction=self.val_fraction, seed=self.seed)

    def train(self, name: str, start: Start, task: Task, kept: Tensor | None) -> Probe:
        """Train two classifiers per learning rate: one on all training images, and one on some of them.

        `kept` (k,) contains the indices of the training images of the second classifier. If `kept` is None, the second
        classifier is not trained.
        """
        data, net = start.features, start.net
        assert net is not None
        assert data.train_positions is not None
        n, width = data.train.shape
        with collectives.single_process():
            views = views_of(task, self.view())
            loader = batches(task, data.train_positions, views, batch_size=self.batch_size, seed=self.seed)
        is_kept = torch.ones(n, dtype=torch.bool) if kept is None else torch.isin(torch.arange(n), kept)
        norm = self.norm(width).to(task.device)
        reported, selecting = (self.heads(width, data.num_classes, loader.batch_size, task) for _ in range(2))
        total = self.epochs * loader.steps_per_epoch
        progress = Progress(task.screen, f"{self.title}, {SUBJECTS[name]}", total=total)
        crops = crop_features(net, start.layer, task, loader, total, width=width, seed=self.seed)
        with closing(crops) as steps:
            for step, (index, features) in enumerate(steps):
                x, y, scale = norm(features), data.train_labels[index].to(task.device), self.factor(step, total=total)
                reported.step(x, y, scale=scale)
                rows = is_kept[index].nonzero().flatten().to(task.device)
                if kept is not None and len(rows):
                    selecting.step(x[rows], y[rows], scale=scale)
                progress(1, f"epoch {step // loader.steps_per_epoch + 1} of {self.epochs}")
        task.screen.stop()
        return Probe(reported=reported.heads(), selecting=selecting.heads(), norm=norm.eval())

    def heads(self, width: int, num_classes: int, batch_size: int, task: Task) -> SgdHeads:
        """Return one untrained classifier per learning rate. The learning rates are scaled by `batch_size` / 256."""
        return SgdHeads(
            lrs=[scale_lr(lr, batch_size=batch_size, rule="linear") for lr in self.lrs],
            weight_decays=[self.weight_decay] * len(self.lrs),
            width=width,
            num_classes=num_classes,
            momentum=self.momentum,
            nesterov=self.nesterov,
            device=task.device,
        )

    def norm(self, width: int) -> nn.Module:
        """Return the normalization layer for features (n, width): BatchNorm without affine parameters, or none.

        The linear probe of MAE (arXiv:2111.06377, A.1) has such a BatchNorm. Its eps is that of
        https://github.com/facebookresearch/mae/blob/main/main_linprobe.py#L222.
        """
        return nn.BatchNorm1d(width, affine=False, eps=1e-6) if self.feature_norm == "batch_norm" else nn.Identity()

    def factor(self, step: int, *, total: int) -> float:
        """Return the factor by which the learning rates are multiplied at 0-based `step` of `total` steps."""
        if self.schedule == "step":
            return warmup_steps_down(step, total=total, milestones=self.milestones)
        return warmup_cosine(step, total=total)

    def select(self, probe: Probe, x: Tensor, y: Tensor, task: Task) -> tuple[list[dict[str, float]], int]:
        """Return the held-out accuracy and loss of every learning rate as a list, and the index of the best one.

        `probe` contains one classifier per learning rate. x (m, d) and y (m,) are the features and labels of the
        held-out images. If there are no held-out images (m = 0), the list is empty, and the index is 0.
        """
        if len(x) == 0:
            return [], 0
        places, losses = self.score(probe, probe.selecting, x, y, task)
        grid = [
            {"lr": float(lr), "val_top1": accuracy(place, 1), "val_loss": float(loss)}
            for lr, place, loss in zip(self.lrs, places, losses, strict=True)
        ]
        return grid, best(grid)

    def score(self, probe: Probe, heads: Heads, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        """Evaluate G classifiers, one per learning rate, on features x (m, d) with labels y (m,).

        `heads` contains the weights and biases of the classifiers. `probe.norm` normalizes the features first.

        Returns the ranks (G, m) of the true classes, and the mean losses (G,).
        """
        num_classes = len(heads[1]) // len(self.lrs)
        places, losses = [], torch.zeros(len(self.lrs))
        for rows, labels in zip(torch.split(x, task.batch_size), torch.split(y, task.batch_size), strict=True):
            with torch.no_grad():
                inputs = probe.norm(rows.to(task.device).float())
            place, loss = score(inputs, labels.to(task.device), heads, num_classes=num_classes)
            places.append(place.cpu())
            losses += loss.cpu() * (len(rows) / len(x))
        return torch.cat(places, dim=1), losses
