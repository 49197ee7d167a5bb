"""Fine-tuning with a fixed learning rate: an example of a protocol that trains. conf/protocol/quick_finetune.yaml"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sslcli.evaluation.base import Outcome
from sslcli.evaluation.result import label_rank
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.training import Recipe, fit, predict
from sslcli.report.console import Progress


@dataclass(frozen=True, kw_only=True)
class QuickFinetune(Recipe):
    """The protocol `quick_finetune`: trains all parameters and a linear layer on the labels of the training split.

    Args:
        lr: peak learning rate, above 0.
    """

    title = "quick fine-tuning"

    lr: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be above 0: 0.05 is usual")

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Train a copy of each network, then evaluate it once on the reported split."""
        data = starts["trained"].features
        split, _, labels = data.reported()
        positions = data.val_positions if split == "val" else data.test_positions
        assert data.train_positions is not None
        assert positions is not None
        progress = Progress(task.screen, self.title, total=len(starts) * self.steps)
        accuracies = {}
        for name, start in starts.items():
            net = start.classifier(task)
            fit(net, task, data.train_positions, self, lr=self.lr, seed=self.seed, progress=progress, facts=name)
            rank = label_rank(predict(net, task, positions), labels)
            accuracies[name] = self.numbers(rank, data.num_classes)  # top1, top5, interval
        task.screen.stop()
        result = {
            "protocol": "quick_finetune",
            "split": split,
            **accuracies.pop("trained"),
            "n_train": len(data.train),
            "n_test": len(positions),
            "num_classes": data.num_classes,
            "lr": self.lr,
            **self.facts(),  # seed and training transform
        }
        return Outcome(result=result | ({"baselines": accuracies} if accuracies else {}))
