"""Semi-supervised evaluation: fine-tuning on few labels, in class-balanced nested subsets, with several seeds.

SimCLR (arXiv:2002.05709, section 6) and SimCLR v2 (arXiv:2006.10029) use 1 % and 10 % of ImageNet's labels. SimCLR v2
fine-tunes from the first layer of the projection head. SimCLR's subsets are published as list files, see
`sslcli.evaluation.label_list`. Yaml: conf/protocol/semi.yaml.

Shapes: S seeds, m images in the split on which accuracies are reported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar

import torch
from torch import Tensor

from sslcli.data.sources.base import Source
from sslcli.distributed import shared_work
from sslcli.evaluation.base import Outcome
from sslcli.evaluation.features import FeatureSet, computed_on
from sslcli.evaluation.finetune import Plan, Trained, Tuned
from sslcli.evaluation.label_list import LabelList, read_list, rows_of
from sslcli.evaluation.linear import Linear
from sslcli.evaluation.result import accuracy, bootstrap_runs, label_rank, top5
from sslcli.evaluation.splits import whole_training_set
from sslcli.evaluation.subsets import subset
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.variants import join_parts


@dataclass(frozen=True, kw_only=True)
class Semi(Tuned):
    """The protocol `semi`: fine-tuning on few labels. If `linear` is true, a linear probe is evaluated as well.

    Three settings select the labels: `fraction` (of the labels of each class), `labels_per_class`, and `list` (a file
    with the names of the labeled images). `labels_per_class` and `list` override `fraction`, and only one of them may
    be set.

    The labeled images are drawn from all labeled training images. The images of `val` are included, unless `val` is the
    reported split.
    """

    shares_work: ClassVar[bool] = True
    named: ClassVar[dict[str, Any]] = {
        "seeds": 3,
        "seed": 0,
        "steps": 150,
        "warm_start": False,
        "batch_norm": "train",
    }

    fraction: float | None = 0.01
    labels_per_class: int | None = None
    list: str | os.PathLike[str] | None = None
    seeds: int = 3
    linear: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1: 3 to 5 are usual")
        if self.fraction is None and self.labels_per_class is None and self.list is None:
            raise ValueError("fraction, labels_per_class and list are all null: set one of them, as in fraction=0.01")
        if self.labels_per_class is not None and self.list is not None:
            raise ValueError(
                f"labels_per_class={self.labels_per_class} and list={self.list} are two subsets of labels: set only one"
            )
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise ValueError(f"labels_per_class={self.labels_per_class} must be at least 1: 4, 25 and 400 are usual")
        # This reads the list, so that errors in it are found before features are extracted.
        if self.label_fraction is not None and not 0 < self.label_fraction <= 1:
            raise ValueError(f"fraction={self.label_fraction} must be above 0 and at most 1: 0.01 and 0.1 are usual")

    @property
    def label_fraction(self) -> float | None:
        """Fraction of the labels of each class that are used; None if `labels_per_class` or `list` is set."""
        return self.fraction if self.labels_per_class is None and self.listed is None else None

    @cached_property
    def listed(self) -> LabelList | None:
        """Content of the file `list`; None if `list` is not set."""
        return None if self.list is None else read_list(Path(self.list))

    def training_positions(self, source: Source, monitor: Mapping[str, Any]) -> Tensor:
        """Return the positions (n,) of the images of "train" and "val". If "val" is reported, leave out its images."""
        return whole_training_set(source, self.reported_splits(source.nonempty_splits()))

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the result's name, with the label subset and the settings that are not at their defaults.

        The label subset is written as the name of the list file, the labels per class, or the percentage of the labels.
        Of the other settings, only the keys of the class attribute `named` can be part of the suffix.
        """
        labels = f"{self.labels_per_class}-per-class"
        if self.listed is not None:
            labels = f"list-{self.listed.name}"
        elif self.label_fraction is not None:
            labels = f"{100 * self.label_fraction:.10g}pct"
        return join_parts(labels, super().variant(monitor))

    def description(self, result: Mapping[str, Any]) -> str:
        """Return one line that names the other accuracies to which the accuracy in `result` can be compared."""
        subsets = "the images of a list" if self.listed is not None else "random subsets, not those of publications"
        seeds = "one seed" if self.seeds == 1 else f"mean over {self.seeds} seeds"
        return (
            f"fine-tuning on {result['n_train']:,} of {result['n_pool']:,} labels for {self.steps:,} steps, {seeds} "
            f"({subsets}), measured on {result['n_test']:,} images of {result['split']}: compare with the random "
            "initialization, which has the same labels and steps; comparable with publications only with their labels "
            "and steps"
        )

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Train copies of each network in `starts`, each copy on a small subset of the labeled images.

        There is one subset per seed. The subsets are the same for all networks.
        """
        data = starts["trained"].features
        assert data.train_positions is not None
        subsets = self.subsets(data, task.source)
        plans = [Plan(start=start, subsets=subsets, choosing=self.seeds) for start in starts.values()]
        results, net = self.learn(plans, task, title="fine-tuning on few labels")
        found = dict(zip(starts, results, strict=True))
        probes = self.probe(starts, subsets, task) if self.linear else {}
        trained = found["trained"]
        result = {
            "protocol": "semi",
            "split": data.reported()[0],
            **self.numbers(trained.place, data.num_classes),
            "runs": self.runs(trained, data.num_classes),
            "chosen": trained.chosen,
            "grid": trained.grid,
            "n_train": len(subsets[0]),
            "n_pool": len(data.train),
            **({} if self.listed is None else {"list_digest": self.listed.digest}),
            "n_test": trained.place.shape[1],
            "num_classes": data.num_classes,
            **self.facts(),
        }
        if self.linear:
            result["linear"] = self.numbers(probes["trained"], data.num_classes)
        if "random" in found:
            random = self.numbers(found["random"].place, data.num_classes) | {"chosen": found["random"].chosen}
            if self.linear:
                random["linear"] = self.numbers(probes["random"], data.num_classes)
            result["baselines"] = {"random": random}
        # Before, a fraction was that of the split "train", also if val was no reported split.
        larger = self.label_fraction is not None and not bool(
            torch.isin(data.train_positions, task.source.splits["train"]).all()
        )
        variant = "train-and-val" if larger else ""
        return Outcome(result=result, net=net, positions=data.train_positions[subsets[0]], variant=variant)

    def subsets(self, data: FeatureSet, source: Source) -> Sequence[Tensor]:
        """Return the rows (k,) of the labeled images in `data.train` for each of S seeds.

        The setting `list` names a file with the names of the labeled images. Raises ValueError if these names do not
        match the training images (see `rows_of`), or if the images with these names have a single class.
        """
        assert data.train_positions is not None
        if self.listed is None:
            return [
                subset(
                    data.train_positions,
                    data.train_labels,
                    seed=self.seed + number,
                    fraction=self.label_fraction,
                    per_class=self.labels_per_class,
                )
                for number in range(self.seeds)
            ]
        rows = rows_of(self.listed, map(source.path, data.train_positions.tolist()))
        if len(set(data.train_labels[rows].tolist())) < 2:
            raise ValueError(f"the images of list={self.list} have a single class: list images of two classes or more")
        return [rows] * self.seeds

    def numbers(self, place: Tensor, num_classes: int) -> dict[str, Any]:
        """Return mean and standard deviation of the accuracy over seeds, and a confidence interval of the mean.

        `place` (S, m) contains the ranks of the true classes of m images for S seeds. The best rank is 0. The interval
        accounts for the random choice of the seeds and for the random choice of the images.
        """
        top1 = [accuracy(row, 1) for row in place]
        interval = bootstrap_runs(place == 0, seed=self.seed, resamples=self.resamples)
        return {
            "top1": fmean(top1),
            "top5": fmean(top5(row, num_classes) for row in place),
            "std": stdev(top1) if len(top1) > 1 else None,
            "interval": list(interval),
        }

    def runs(self, trained: Trained, num_classes: int) -> Sequence[Mapping[str, float]]:
        """Return the accuracies for each seed."""
        pairs = zip(trained.top(1, num_classes=num_classes), trained.top(5, num_classes=num_classes), strict=True)
        return [{"seed": self.seed + n, "top1": one, "top5": five} for n, (one, five) in enumerate(pairs)]

    def probe(self, starts: Mapping[str, Start], subsets: Sequence[Tensor], task: Task) -> dict[str, Tensor]:
        """Fit a linear probe of the frozen features of each network on each of S subsets of the training images.

        Returns ranks (S, m) by the names of the networks. The ranks are those of the true classes of the m images of
        the reported split. The best rank is 0. The processes share the probes.
        """
        names = [name for name in ("trained", "random") if name in starts]
        jobs = [
            partial(probed, starts[name].features, rows, seed=self.seed + number, device=task.device)
            for name in names
            for number, rows in enumerate(subsets)
        ]
        places = torch.stack(shared_work.spread(jobs)).split(len(subsets))  # type: ignore[no-untyped-call]
        return dict(zip(names, places, strict=True))


def probed(data: FeatureSet, rows: Tensor, *, seed: int, device: torch.device) -> Tensor:
    """Fit a linear probe on the training features at `rows` (k,), and return the ranks (m,) on the reported split.

    The ranks are those of the true classes of the m images. The best rank is 0. The probe is computed on `device`.
    """
    _, x, y = data.reported()

    def fit(train: Tensor, labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
        head = Linear(seed=seed).head(train, labels, num_classes=data.num_classes)
        return label_rank(torch.addmm(head.bias, x.float(), head.weight.T), y)

    return computed_on(device, fit, data.train[rows], data.train_labels[rows], x, y).cpu()
