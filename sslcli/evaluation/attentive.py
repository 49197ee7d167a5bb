"""Attentive probe: one learned query attends to the patch tokens of a frozen backbone, before a linear classifier.

CAPI (Darcet et al. 2025, arXiv:2502.08769, https://github.com/facebookresearch/capi/blob/main/eval_classification.py)
and AIM (El-Nouby et al. 2024, arXiv:2401.08541) compare masked image models, such as MAE and I-JEPA, by this probe.
Yaml: conf/protocol/attentive.yaml. The classifier: `sslcli.evaluation.attentive_heads`.

    tokens (N, P, D) = feature map of the frozen backbone, in evaluation mode, without gradient
    logits (N, G, C) = G attentive classifiers, one for each pair of learning rate and weight decay
    AdamW step on the cross-entropies

Sizes: N images per batch, P tokens (patches, or positions of a feature map), D width, C classes, G classifiers.

Departures from the official code of CAPI:

- By default, a BatchNorm without affine parameters normalizes the tokens, as in AIM: tokens of MAE share a large mean.
- By default, the tokens are those of whole images. They are extracted once and cached, so an evaluation costs one
  forward pass per image. With `crop_scale` or `flip`, they are computed for random crops in every step, as published.
- Each pair of learning rate and weight decay has two classifiers: one skips the held-out part of the training images,
  and its accuracy on this part is used for the selection. The other one is trained on all training images, and its
  accuracy is reported. CAPI reports the first one.
- All classifiers have the same initial weights, so a result does not depend on the other pairs of the grid.
- Widths that 64 does not divide are accepted, see `num_heads`, and feature maps of convolutional networks.
- Training lasts for a number of epochs instead of 12,500 steps. The last incomplete batch of an epoch is dropped.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sslcli.data.views.spec import View
from sslcli.distributed import collectives, watchdog
from sslcli.errors import ConfigError, class_name
from sslcli.evaluation import layers
from sslcli.evaluation.attentive_heads import AttentiveHeads, Probe, SweepAdamW
from sslcli.evaluation.base import Outcome, Protocol, outcome_of, trained_and_measured
from sslcli.evaluation.finetune import reported_positions
from sslcli.evaluation.random_crops import crop_features
from sslcli.evaluation.result import accuracy, best, bootstrap_interval, top5
from sslcli.evaluation.subsets import held_out
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.training import batches, outputs, views_of
from sslcli.evaluation.variants import suffix
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating
from sslcli.nn.schedule import scale_lr, warmup_cosine
from sslcli.report.console import SUBJECTS, Progress

FEATURE_NORMS = ("none", "batch_norm")
HEAD_WIDTH = 64  # values per attention head, as in CAPI
PART = 2048  # images whose tokens are in memory at once when tokens are not extracted once


@dataclass(frozen=True, kw_only=True)
class Attentive(Protocol):
    """The protocol `attentive`: attentive classifiers on the patch tokens of a frozen backbone.

    Learning rate and weight decay are selected on held-out training images. Then the accuracy on the reported split is
    measured. conf/protocol/attentive.yaml describes the settings.

    Raises ValueError if a value is out of range.
    """

    title: ClassVar[str] = "attentive probe"
    trains_on_val: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    shares_work: ClassVar[bool] = True
    named: ClassVar[dict[str, Any]] = {
        "epochs": 20,
        "num_heads": None,
        "feature_norm": "batch_norm",
        "crop_scale": None,
        "flip": 0.0,
        "seed": 0,
    }

    lrs: Sequence[float] = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
    weight_decays: Sequence[float] = (5e-4, 5e-2)
    num_heads: int | None = None
    feature_norm: str = "batch_norm"
    epochs: int = 20
    batch_size: int = 256
    warmup: float = 0.1
    crop_scale: Sequence[float] | None = None
    flip: float = 0.0
    val_fraction: float = 0.1
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        if self.feature_norm not in FEATURE_NORMS:
            raise ValueError(f"feature_norm={self.feature_norm!r} is unknown: choose {' or '.join(FEATURE_NORMS)}")
        if len(self.lrs) == 0 or not all(lr > 0 for lr in self.lrs):
            raise ValueError(f"lrs={list(self.lrs)} must contain at least one number, all above 0")
        if len(self.weight_decays) == 0 or not all(decay >= 0 for decay in self.weight_decays):
            raise ValueError(
                f"weight_decays={list(self.weight_decays)} must contain at least one number, all at least 0"
            )
        for name in ("epochs", "batch_size", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(f"num_heads={self.num_heads} must be at least 1, or null for heads of {HEAD_WIDTH} values")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be in [0, 1): 0.1 is usual")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be between 0 and 1: 0.1 is usual")
        self.view()  # check the settings before features are extracted

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """The G pairs of learning rate and weight decay."""
        return list(product(self.lrs, self.weight_decays))

    @property
    def extracts_once(self) -> bool:
        """True if all epochs use the same tokens, those of whole images."""
        return self.crop_scale is None and self.flip == 0

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the result's name: the settings in `named` with another value than in the yaml file."""
        return suffix(self, self.named)

    def description(self, result: Mapping[str, Any]) -> str:
        """Return one line that names the accuracies to which the accuracy in `result` can be compared."""
        start = (
            f"attentive probe (one query attends to {result['num_tokens']} tokens of the frozen backbone, "
            f"{result['train_transform']}), {self.epochs} epochs, {trained_and_measured(result)}: "
        )
        if self.extracts_once:
            return (
                f"{start}the published protocol trains on random crops (protocol.crop_scale=[0.08,1] "
                "protocol.flip=0.5), which can change the accuracy; not comparable with linear accuracies"
            )
        return (
            f"{start}comparable with published attentive accuracies of the same backbone and pre-training, not with "
            "linear accuracies"
        )

    def choose_layer(self, feature_layer: str, net: nn.Module, images: Tensor) -> tuple[str, str]:
        """Return the layer of the tokens, and the default layer: the last stage of the backbone.

        If all epochs use the same tokens, the layer contains all positions of the feature map. Otherwise, it is the
        mean over the positions, and the tokens are computed in every step. Raises ConfigError if the backbone has no
        feature map, if `feature_layer` is not the name of one, or if `num_heads` does not divide its width.
        """
        maps = layers.maps(net, images)
        if not maps:
            backbone = net.evaluated_network if isinstance(net, Method) else net
            raise ConfigError(
                f"the backbone {class_name(type(backbone))} has neither patch tokens nor feature maps, to which "
                "protocol=attentive attends: choose protocol=linear or linear_sgd, or define tokens(images) or "
                "stages(images) in the backbone. backbone=vit_tiny, vit_small and vit_base have patch tokens; small, "
                "dcgan, the ResNets and most timm models have feature maps"
            )
        default = list(maps)[-1]
        layer = default if feature_layer == layers.BACKBONE else feature_layer
        if layer not in maps:
            raise ConfigError(
                f"feature_layer is {feature_layer!r}, but protocol=attentive attends to the positions of a feature "
                f"map: choose one of {', '.join(maps)}"
            )
        self.heads_of(maps[layer].shape[1])
        ending = layers.TOKENS if self.extracts_once else ""
        return layer + ending, default + ending

    def heads_of(self, width: int) -> int:
        """Return the number of attention heads for tokens of `width` values.

        The default is the largest number of heads that divides the width with at least 64 values per head, or 1. Raises
        ConfigError if `num_heads` does not divide the width.
        """
        if self.num_heads is None:
            return max(number for number in range(1, max(1, width // HEAD_WIDTH) + 1) if width % number == 0)
        if width % self.num_heads:
            raise ConfigError(f"protocol.num_heads={self.num_heads} must divide the width {width} of the tokens")
        return self.num_heads

    def view(self) -> View:
        """Return the training augmentation."""
        scale = None if self.crop_scale is None else tuple(self.crop_scale)
        return View(crop_scale=scale, flip=self.flip)  # type: ignore[arg-type]

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Train and evaluate the classifiers of each network in `starts`, one network after the other.

        Results of baselines are cached, because they are the same for all checkpoints of a run.
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
        data, count = start.features, len(self.pairs)
        assert data.train_positions is not None
        out = torch.empty(0, dtype=torch.int64)
        if count > 1:
            _, out = held_out(
                torch.arange(len(data.train)), data.train_labels, fraction=self.val_fraction, seed=self.seed
            )
        probe = self.train(name, start, task, out)
        grid: list[dict[str, float]] = []
        if len(out):
            found = self.score(probe, start, task, data.train[out], data.train_positions[out], data.train_labels[out])
            grid = [
                {"lr": lr, "weight_decay": decay, "val_top1": accuracy(place, 1), "val_loss": float(loss)}
                for (lr, decay), place, loss in zip(self.pairs, *(each[count:] for each in found), strict=True)
            ]
        number = best(grid) if grid else 0
        split, x_test, y_test = data.reported()
        places, _ = self.score(probe, start, task, x_test, reported_positions(data), y_test)
        lr, decay = self.pairs[number]
        return {
            "protocol": "attentive",
            "split": split,
            "top1": accuracy(places[number], 1),
            "top5": top5(places[number], data.num_classes),
            "interval": list(bootstrap_interval(places[number] == 0, seed=self.seed, resamples=self.resamples)),
            "chosen": {"lr": lr, "weight_decay": decay},
            "grid": grid,
            "n_train": len(data.train),
            "n_test": len(y_test),
            "num_classes": data.num_classes,
            "num_tokens": probe.shape[0],
            "num_heads": probe.heads.query.shape[1],
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "feature_norm": self.feature_norm,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "train_transform": self.view().describe(),
        }

    def train(self, name: str, start: Start, task: Task, out: Tensor) -> Probe:
        """Train the classifiers of all pairs. `out` (k,) contains the indices of the held-out training images."""
        data = start.features
        assert start.net is not None
        maps = layers.maps(start.net, task.example())[start.layer.removesuffix(layers.TOKENS)]
        shape = (maps.shape[2:].numel(), maps.shape[1])
        sets = 2 if len(out) else 1
        heads = AttentiveHeads(
            sets * len(self.pairs),
            width=shape[1],
            num_heads=self.heads_of(shape[1]),
            num_classes=data.num_classes,
            seed=self.seed,
        ).to(task.device)
        norm = nn.BatchNorm1d(shape[1], affine=False, eps=1e-6) if self.feature_norm == "batch_norm" else nn.Identity()
        probe = Probe(heads=heads, norm=norm.to(task.device), shape=shape)
        size = min(self.batch_size, len(data.train))
        lrs = [scale_lr(lr, batch_size=size, rule="linear") for lr, _ in self.pairs]
        optimizer = SweepAdamW(heads, lrs=lrs * sets, weight_decays=[decay for _, decay in self.pairs] * sets)
        is_kept = ~torch.isin(torch.arange(len(data.train)), out)
        steps_per_epoch = len(data.train) // size
        total = self.epochs * steps_per_epoch
        progress = Progress(task.screen, f"{self.title}, {SUBJECTS[name]}", total=total)
        with closing(self.steps(start, task, size, total, width=shape[0] * shape[1])) as steps:
            for step, (index, features) in enumerate(steps):
                kept = is_kept[index].float()
                uses = torch.stack([torch.ones(size) / size, kept / kept.sum().clamp(min=1)][:sets], dim=1)  # (N, sets)
                weights = uses.repeat_interleave(len(self.pairs), dim=1).to(task.device)
                heads.accumulate(probe.inputs(features), data.train_labels[index].to(task.device), weights)
                optimizer.step(scale=warmup_cosine(step, total=total, warmup=round(self.warmup * total)))
                watchdog.report_progress()
                progress(1, f"epoch {step // steps_per_epoch + 1} of {self.epochs}")
        task.screen.stop()
        norm.eval()
        return probe

    def steps(
        self, start: Start, task: Task, size: int, total: int, *, width: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield the image numbers (size,) and the tokens (size, width) of the images of each of `total` steps."""
        data, net = start.features, start.net
        assert net is not None
        assert data.train_positions is not None
        if not self.extracts_once:
            with collectives.single_process():
                loader = batches(
                    task, data.train_positions, views_of(task, self.view()), batch_size=size, seed=self.seed
                )
            layer = start.layer + layers.TOKENS
            yield from crop_features(net, layer, task, loader, total, width=width, seed=self.seed)
            return
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.empty(0, 0, dtype=torch.int64)
        for step in range(total):
            number = step % (len(data.train) // size)
            if number == 0:
                order = torch.randperm(len(data.train), generator=generator)
            index = order[number * size : (number + 1) * size]
            yield index, data.train[index]

    def score(
        self, probe: Probe, start: Start, task: Task, features: Tensor, positions: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Evaluate all classifiers on the images at `positions` (m,) with `labels` (m,).

        `features` are the features of the images at the layer of `start`. Returns the ranks (G, m) of the true classes,
        and the mean losses (G,), with a large number in place of NaN. G is the number of all classifiers of `probe`.
        """
        parts = zip(self.whole_images(start, task, features, positions), torch.split(labels, PART), strict=True)
        found = [probe.score(tokens, some) for tokens, some in parts]
        places, losses = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
        return places, losses.mean(1).nan_to_num(nan=torch.finfo(losses.dtype).max)

    def whole_images(self, start: Start, task: Task, features: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """Yield the tokens (at most `PART`, P * D) of the images at `positions` (m,), with the test transform."""
        if self.extracts_once:
            yield from torch.split(features, PART)
            return
        net = start.net
        assert net is not None
        progress = Progress(task.screen, f"{self.title}, accuracy", total=len(positions))
        for some in torch.split(positions, PART):
            with evaluating(net):
                yield outputs(lambda images: layers.read(net, start.layer + layers.TOKENS, images), task, some)
            progress(len(some))
        task.screen.stop()
