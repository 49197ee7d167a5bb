"""Fine-tuning: the whole net trained on labels, from pre-training and, by the same protocol, from scratch.

SimCLR (arXiv:2002.05709, appendix B.8) and SimCLR v2 (arXiv:2006.10029, section 3: from a middle layer of the head);
layer-wise decay as in MAE (arXiv:2111.06377). The linear head starts at zero, as in SimCLR v2, or with `warm_start`
from a probe of the frozen features, as LP-FT (arXiv:2202.10054) does. Yaml: conf/protocol/finetune.yaml. S subsets of
labels, m images reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.evaluate.features import FeatureSet
from sslcli.evaluate.network import Classifier
from sslcli.evaluate.result import accuracy, label_rank
from sslcli.evaluate.subsets import held_out
from sslcli.evaluate.training import Progress, Recipe, Start, Task, fit, predict, warm

Choice = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a protocol that trains found: the result, JSON-able, and the net to keep, if any."""

    result: dict[str, Any]
    net: Classifier | None
    positions: Tensor | None = None  # the labelled images that the net was trained on
    files: dict[str, str] = field(default_factory=dict)  # texts to write beside the result, by name


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Nets trained on S subsets of the labels: place (S, m) of the true class of each reported image, and the first."""

    place: Tensor
    net: Classifier
    chosen: Choice
    grid: list[Choice]

    def top(self, k: int) -> list[float]:
        """Accuracy of each run, a share; among all classes where there are fewer than k."""
        return [accuracy(place, min(k, self.net.classify.out_features)) for place in self.place]


def reported_positions(features: FeatureSet) -> Tensor:
    """Where the images are that a number is reported on."""
    positions = features.val_positions if features.test is None else features.test_positions
    assert positions is not None
    return positions


@dataclass(frozen=True, kw_only=True)
class Tuned(Recipe):
    """A recipe whose learning rate is chosen on a held-out part of the labels, and whose net comes from a run."""

    lrs: Sequence[float] = (0.02, 0.1)
    val_fraction: float = 0.1
    warm_start: bool = False
    from_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.lrs) == 0 or not all(lr > 0 for lr in self.lrs):
            raise ValueError(f"lrs={list(self.lrs)} must hold at least one number, all above 0")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be between 0 and 1: 0.1 is usual")
        if self.from_layer is not None and self.from_layer < 0:
            raise ValueError(f"from_layer={self.from_layer} must be at least 0, which is the backbone")

    def trainings(self, subsets: int, *, choosing: int) -> int:
        """How many trainings `learn` takes."""
        return subsets + (choosing * len(self.lrs) if len(self.lrs) > 1 else 0)

    def learn(self, start: Start, task: Task, subsets: list[Tensor], *, choosing: int, progress: Progress) -> Trained:
        """Train on each of `subsets`, rows of start.features.train, at the rate the first `choosing` of them chose.

        The reported split is looked at once for each subset, after the choice.
        """
        grid, chosen = self.choose(start, task, subsets[:choosing], progress)
        labels = start.features.reported()[2]
        positions = reported_positions(start.features)
        places, first = [], None
        for number, rows in enumerate(subsets):
            net = self.train(start, task, rows, chosen["lr"], number, progress)
            places.append(label_rank(predict(net, task, positions), labels))
            first = first or net
        assert first is not None
        return Trained(place=torch.stack(places), net=first, chosen=chosen, grid=grid)

    def choose(
        self, start: Start, task: Task, subsets: list[Tensor], progress: Progress
    ) -> tuple[list[Choice], Choice]:
        """The learning rate that is right most often on what is held out of the subsets, and what each reached.

        Where a class has a single label nothing can be held out, and the first rate is taken.
        """
        data = start.features
        splits = [
            held_out(rows, data.train_labels, fraction=self.val_fraction, seed=self.seed + number)
            for number, rows in enumerate(subsets)
        ]
        if len(self.lrs) == 1 or any(len(out) == 0 for _, out in splits):
            progress(self.steps * (self.trainings(0, choosing=len(subsets))))
            return [], {"lr": float(self.lrs[0])}
        assert data.train_positions is not None
        grid = []
        for lr in self.lrs:
            places, losses = [], []
            for number, (kept, out) in enumerate(splits):
                net = self.train(start, task, kept, lr, number, progress)
                logits = predict(net, task, data.train_positions[out])
                places.append(label_rank(logits, data.train_labels[out]))
                losses.append(F.cross_entropy(logits, data.train_labels[out], reduction="none"))
            loss = float(torch.cat(losses).mean().nan_to_num(nan=torch.inf).clamp(max=torch.finfo(torch.float32).max))
            grid.append({"lr": float(lr), "val_top1": accuracy(torch.cat(places), 1), "val_loss": loss})
        return grid, max(grid, key=lambda entry: (entry["val_top1"], -entry["val_loss"]))

    def train(self, start: Start, task: Task, rows: Tensor, lr: float, number: int, progress: Progress) -> Classifier:
        """One net, trained on `rows` (k,) of start.features.train; `number` is that of the subset."""
        data, seed = start.features, self.seed + number
        assert data.train_positions is not None
        net = start.classifier(task)
        if self.warm_start:
            warm(net, data.train[rows], data.train_labels[rows], seed=seed)
        facts = f"{len(rows)} labels, lr {lr:g}"
        fit(net, task, data.train_positions[rows], self, lr=lr, seed=seed, progress=progress, facts=facts)
        return net


@dataclass(frozen=True, kw_only=True)
class Finetune(Tuned):
    """The protocol `finetune`: all labels of the training split."""

    def __call__(self, starts: dict[str, Start], task: Task) -> Outcome:
        """Train from each start, the run's and where there is one the fresh one."""
        data = starts["trained"].features
        rows = torch.arange(len(data.train))
        total = len(starts) * self.trainings(1, choosing=1) * self.steps
        progress = Progress(task.screen, "fine-tuning", total=total)
        found = {name: self.learn(start, task, [rows], choosing=1, progress=progress) for name, start in starts.items()}
        task.screen.stop()
        trained = found["trained"]
        result = {
            "protocol": "finetune",
            "split": data.reported()[0],
            **self.numbers(trained.place[0], data.num_classes),
            "chosen": trained.chosen,
            "grid": trained.grid,
            "n_train": len(rows),
            "n_test": trained.place.shape[1],
            "num_classes": data.num_classes,
            **self.facts(),
        }
        if "random" in found:
            result["baselines"] = {
                "random": self.numbers(found["random"].place[0], data.num_classes) | {"chosen": found["random"].chosen}
            }
        return Outcome(result=result, net=trained.net, positions=data.train_positions)
