"""Semi-supervised evaluation: fine-tuning on few labels, in class-balanced nested subsets, with several seeds.

SimCLR (arXiv:2002.05709, section 6) and SimCLR v2 (arXiv:2006.10029) use 1 % and 10 % of ImageNet's labels. SimCLR v2
fine-tunes from the first layer of the head. Yaml: conf/protocol/semi.yaml. S is the number of seeds, m the number of
images in the reported split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, ClassVar

import torch
from torch import Tensor

from sslcli.evaluation.base import Outcome
from sslcli.evaluation.finetune import Trained, Tuned
from sslcli.evaluation.linear import Linear
from sslcli.evaluation.result import accuracy, bootstrap_runs, label_rank, top5
from sslcli.evaluation.subsets import subset
from sslcli.evaluation.task import Start, Task
from sslcli.report.console import Progress


@dataclass(frozen=True, kw_only=True)
class Semi(Tuned):
    """The protocol `semi`: fine-tuning on few labels. If `linear` is true, a linear probe is evaluated as well.

    Set either `fraction`, the fraction of the labels of each class, or `labels_per_class`, and leave the other null.
    """

    named: ClassVar[dict[str, Any]] = {
        "seeds": 3,
        "seed": 0,
        "steps": 150,
        "warm_start": False,
        "batch_norm": "train",
    }

    fraction: float | None = 0.01
    labels_per_class: int | None = None
    seeds: int = 3
    linear: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1: 3 to 5 are usual")
        if self.fraction is None and self.labels_per_class is None:
            raise ValueError("fraction and labels_per_class are both null: set one of them, as in fraction=0.01")
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise ValueError(f"labels_per_class={self.labels_per_class} must be at least 1: 4, 25 and 400 are usual")
        if self.label_fraction is not None and not 0 < self.label_fraction <= 1:
            raise ValueError(f"fraction={self.label_fraction} must be above 0 and at most 1: 0.01 and 0.1 are usual")

    @property
    def label_fraction(self) -> float | None:
        """Fraction of the labels of each class; None if `labels_per_class` is set."""
        return None if self.labels_per_class is not None else self.fraction

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix with the labels per class or the percentage of labels, and the settings of `named`."""
        labels = (
            f"{self.labels_per_class}-per-class"
            if self.label_fraction is None
            else f"{100 * self.label_fraction:.10g}pct"
        )
        return "_".join(part for part in (labels, super().variant(monitor)) if part)

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Train from each start. All starts use the same label subsets."""
        data = starts["trained"].features
        assert data.train_positions is not None
        subsets = [
            subset(
                data.train_positions,
                data.train_labels,
                seed=self.seed + number,
                fraction=self.label_fraction,
                per_class=self.labels_per_class,
            )
            for number in range(self.seeds)
        ]
        total = len(starts) * self.trainings(self.seeds, choosing=self.seeds) * self.steps
        progress = Progress(task.screen, "fine-tuning on few labels", total=total)
        found = {
            name: self.learn(start, task, subsets, choosing=self.seeds, progress=progress)
            for name, start in starts.items()
        }
        task.screen.stop()
        trained = found["trained"]
        result = {
            "protocol": "semi",
            "split": data.reported()[0],
            **self.numbers(trained.place, data.num_classes),
            "runs": self.runs(trained),
            "chosen": trained.chosen,
            "grid": trained.grid,
            "n_train": len(subsets[0]),
            "n_test": trained.place.shape[1],
            "num_classes": data.num_classes,
            **self.facts(),
        }
        if self.linear:
            result["linear"] = self.numbers(probed(starts["trained"], subsets, seed=self.seed), data.num_classes)
        if "random" in found:
            random = self.numbers(found["random"].place, data.num_classes) | {"chosen": found["random"].chosen}
            if self.linear:
                random["linear"] = self.numbers(probed(starts["random"], subsets, seed=self.seed), data.num_classes)
            result["baselines"] = {"random": random}
        return Outcome(result=result, net=trained.net, positions=data.train_positions[subsets[0]])

    def numbers(self, place: Tensor, num_classes: int) -> dict[str, Any]:
        """Return mean and standard deviation of the accuracy over seeds, and an interval.

        `place` (S, m) contains the ranks of the true classes. The interval covers the sampling of seeds and the
        sampling of images.
        """
        top1 = [accuracy(row, 1) for row in place]
        interval = bootstrap_runs(place == 0, seed=self.seed, resamples=self.resamples)
        return {
            "top1": fmean(top1),
            "top5": fmean(top5(row, num_classes) for row in place),
            "std": stdev(top1) if len(top1) > 1 else None,
            "interval": list(interval),
        }

    def runs(self, trained: Trained) -> list[dict[str, float]]:
        """Return the accuracies for each seed."""
        pairs = zip(trained.top(1), trained.top(5), strict=True)
        return [{"seed": self.seed + n, "top1": one, "top5": five} for n, (one, five) in enumerate(pairs)]


def probed(start: Start, subsets: list[Tensor], *, seed: int) -> Tensor:
    """Fit a linear probe of frozen features on each of S subsets, and return the ranks (S, m) of the true classes."""
    data = start.features
    _, x, y = data.reported()
    places = []
    for number, rows in enumerate(subsets):
        head = Linear(seed=seed + number).head(data.train[rows], data.train_labels[rows], num_classes=data.num_classes)
        places.append(label_rank(torch.addmm(head.bias, x.float(), head.weight.T), y))
    return torch.stack(places)
