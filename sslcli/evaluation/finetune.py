"""Fine-tuning of the whole network on labels, from pre-trained weights and, as a baseline, from scratch.

Fine-tuning follows SimCLR (arXiv:2002.05709, appendix B.8) and SimCLR v2 (arXiv:2006.10029, section 3). SimCLR v2
fine-tunes from a middle layer of the projection head. Layer-wise learning rate decay is as in MAE (arXiv:2111.06377).
By default, the linear classifier is initialized with zeros, as in SimCLR v2. If `warm_start` is true, it is initialized
with a linear probe of the frozen features, as in LP-FT (arXiv:2202.10054). Yaml: conf/protocol/finetune.yaml.

Shapes: S label subsets, m images in the split on which accuracies are reported. A copy of the network is trained on
each subset. S is 1 for `finetune`, and the number of seeds for `semi` and `utility`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed import shared_work
from sslcli.errors import ConfigError
from sslcli.evaluation import layers
from sslcli.evaluation.base import Outcome, trained_and_measured
from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.network import Classifier
from sslcli.evaluation.result import accuracy, best, label_rank
from sslcli.evaluation.subsets import held_out
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.training import Recipe, fit, predict, warm
from sslcli.methods.base import Method
from sslcli.report.console import Progress

Choice = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Trainings that start from one network: one on each of S label subsets.

    Attributes:
        start: the network and its features.
        subsets: S subsets of the training images, each as row numbers of start.features.train.
        choosing: number of subsets, the first ones, on which the learning rate is selected.
    """

    start: Start
    subsets: Sequence[Tensor]
    choosing: int = 1


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Result of training on S label subsets.

    One network is trained on each subset, and is evaluated on the m images of the reported split.

    Attributes:
        place: (S, m) the 0-based rank of the true class among the predictions for each image, for the network of each
            subset. A rank of 0 is a correct prediction.
        chosen: the selected learning rate, with its held-out accuracy and loss if candidates were compared.
        grid: the held-out accuracy and loss of each candidate learning rate; empty if no candidates were compared.
    """

    place: Tensor
    chosen: Choice
    grid: list[Choice]

    def top(self, k: int, *, num_classes: int) -> list[float]:
        """Return the top-k accuracy for each label subset, as fractions. k is capped at the number of classes."""
        return [accuracy(place, min(k, num_classes)) for place in self.place]


def reported_positions(features: FeatureSet) -> Tensor:
    """Return the indices, in the source, of the images on which the reported accuracy is measured."""
    positions = features.val_positions if features.test is None else features.test_positions
    assert positions is not None
    return positions


@dataclass(frozen=True, kw_only=True)
class Tuned(Recipe):
    """Base class of protocols that train the network of a run on labels.

    The learning rate is selected by the accuracy on labeled images that are held out of the training.
    """

    trains_on_val: ClassVar[bool] = True
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
            raise ValueError(f"from_layer={self.from_layer} must be at least 0; 0 is the backbone")

    def choose_layer(self, feature_layer: str, net: nn.Module, images: Tensor) -> tuple[str, str]:
        """Return the layer to train from, and the default layer.

        The default layer is the layer to train from if neither `feature_layer` nor `from_layer` is set.

        If `feature_layer` is not the output of the backbone, it is the layer to train from. Otherwise, the layer to
        train from is layer number `from_layer` of the projection head. Number 0 means the output of the backbone. If
        `from_layer` is None, the method's `finetune_layer` is the number.
        """
        feature_layer, _ = super().choose_layer(feature_layer, net, images)
        usual = net.finetune_layer if isinstance(net, Method) else 0
        number = usual if self.from_layer is None else self.from_layer
        if feature_layer != layers.BACKBONE and self.from_layer:
            raise ConfigError(
                f"feature_layer is {feature_layer!r} and protocol.from_layer {self.from_layer}, which is another "
                "layer: give one of them"
            )
        if self.from_layer and f"head{self.from_layer}" not in layers.names(net, images):
            last = net.head_layers if isinstance(net, Method) else 0
            has = f"has the layers 1 to {last}" if last else "gives no features (that of simclr_v2 does)"
            raise ConfigError(
                f"protocol.from_layer is {self.from_layer}, but the head of this net {has}; 0 is the backbone"
            )
        chosen = feature_layer if feature_layer != layers.BACKBONE or number == 0 else f"head{number}"
        return chosen, f"head{usual}" if usual else layers.BACKBONE

    def learn(self, plans: Sequence[Plan], task: Task, *, title: str) -> tuple[list[Trained], Classifier | None]:
        """Select the learning rate of each plan, then train on each of its subsets.

        Returns the results of all plans, and the network that was trained on the first subset of the first plan. The
        reported split is used once per training, after the selection. The processes share the trainings. Each training
        runs on one process, so its result does not depend on the number of processes. The network is None on all ranks
        but rank 0. `title` is the title of the progress display.
        """
        splits = [self.held_out(plan) for plan in plans]
        counts = (sum(map(len, splits)) * len(self.lrs), sum(len(plan.subsets) for plan in plans))
        total = sum(map(shared_work.own_jobs, counts)) * self.steps
        progress = Progress(task.screen, title, total=total)
        chosen = self.choose(plans, splits, task, progress)
        nets: list[Classifier] = []

        def train(plan: Plan, number: int, lr: float) -> Tensor:
            net = self.train(plan.start, task, plan.subsets[number], lr, number, progress)
            if plan is plans[0] and number == 0:
                nets.append(net)
            positions = reported_positions(plan.start.features)
            return label_rank(predict(net, task, positions), plan.start.features.reported()[2])

        places = iter(
            shared_work.spread(
                [
                    partial(train, plan, number, choice["lr"])
                    for plan, (_, choice) in zip(plans, chosen, strict=True)
                    for number in range(len(plan.subsets))
                ]
            )
        )
        task.screen.stop()
        found = [
            Trained(place=torch.stack([next(places) for _ in plan.subsets]), chosen=choice, grid=grid)
            for plan, (grid, choice) in zip(plans, chosen, strict=True)
        ]
        return found, nets[0] if nets else None

    def held_out(self, plan: Plan) -> list[tuple[Tensor, Tensor]]:
        """Return the kept and the held-out rows of each subset on which the learning rate is selected.

        The result is [] if nothing is selected. This is the case if there is only one learning rate, or if no image of
        a subset can be held out, because each class of this subset has a single image.
        """
        splits = [
            held_out(rows, plan.start.features.train_labels, fraction=self.val_fraction, seed=self.seed + number)
            for number, rows in enumerate(plan.subsets[: plan.choosing])
        ]
        return [] if len(self.lrs) == 1 or any(len(out) == 0 for _, out in splits) else splits

    def choose(
        self,
        plans: Sequence[Plan],
        splits: Sequence[Sequence[tuple[Tensor, Tensor]]],
        task: Task,
        progress: Progress,
    ) -> list[tuple[list[Choice], Choice]]:
        """Return the results of all learning rates, and the one with the best pooled held-out accuracy, for each plan.

        `splits` are the results of `held_out` for the plans. The held-out images of all subsets of a plan are pooled.
        If they are [], the first learning rate is returned without training.
        """

        def train(plan: Plan, number: int, kept: Tensor, out: Tensor, lr: float) -> tuple[Tensor, Tensor]:
            data = plan.start.features
            assert data.train_positions is not None
            net = self.train(plan.start, task, kept, lr, number, progress)
            logits, labels = predict(net, task, data.train_positions[out]), data.train_labels[out]
            return label_rank(logits, labels), F.cross_entropy(logits, labels, reduction="none")

        results = iter(
            shared_work.spread(
                [
                    partial(train, plan, number, kept, out, lr)
                    for plan, rows in zip(plans, splits, strict=True)
                    for lr in self.lrs
                    for number, (kept, out) in enumerate(rows)
                ]
            )
        )
        chosen = []
        for rows in splits:
            grid = [self.choice(lr, [next(results) for _ in rows]) for lr in self.lrs] if rows else []
            chosen.append((grid, grid[best(grid)] if grid else {"lr": float(self.lrs[0])}))
        return chosen

    def choice(self, lr: float, results: Sequence[tuple[Tensor, Tensor]]) -> Choice:
        """Return a learning rate with its accuracy and loss on the pooled held-out images of all subsets.

        `results` contains the ranks of the true classes and the losses of the held-out images of each subset.
        """
        places, losses = (torch.cat(parts) for parts in zip(*results, strict=True))
        loss = float(losses.mean().nan_to_num(nan=torch.inf).clamp(max=torch.finfo(torch.float32).max))
        return {"lr": float(lr), "val_top1": accuracy(places, 1), "val_loss": loss}

    def train(self, start: Start, task: Task, rows: Tensor, lr: float, number: int, progress: Progress) -> Classifier:
        """Return a network trained on a subset of the training images.

        `rows` (k,) are the rows of start.features.train that belong to the subset. `number` is the index of the subset.
        The seed of the training is the seed of the protocol plus `number`.
        """
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
    """The protocol `finetune`: fine-tuning on all labels of the training split."""

    shares_work: ClassVar[bool] = True
    named: ClassVar[dict[str, Any]] = {"steps": 350, "warm_start": False, "batch_norm": "train", "seed": 0}

    def description(self, result: Mapping[str, Any]) -> str:
        """Return one line that names the other accuracies to which the accuracy in `result` can be compared."""
        return (
            f"fine-tuning of the whole network for {self.steps:,} steps, {trained_and_measured(result)}: compare with "
            "the random initialization, which has the same steps; comparable with publications only with their steps"
        )

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Fine-tune a copy of each network in `starts`.

        "trained" is the pre-trained network, and is required. "random" is the same network before training, and is
        optional.
        """
        data = starts["trained"].features
        rows = torch.arange(len(data.train))
        plans = [Plan(start=start, subsets=[rows]) for start in starts.values()]
        results, net = self.learn(plans, task, title="fine-tuning")
        found = dict(zip(starts, results, strict=True))
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
        return Outcome(result=result, net=net, positions=data.train_positions)
