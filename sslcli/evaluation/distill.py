"""Distillation: train a student on the predictions of a fine-tuned teacher, without labels.

This is the third stage of SimCLR v2 (arXiv:2006.10029, section 2). The loss is the cross-entropy against the teacher's
probabilities at a temperature, on all training images. Yaml: conf/protocol/distill.yaml. N is the number of images, C
the number of classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sslcli.backbones.wrap import dry_output
from sslcli.distributed import shared_work
from sslcli.evaluation.base import Outcome, trained_and_measured
from sslcli.evaluation.finetune import reported_positions
from sslcli.evaluation.layers import BACKBONE
from sslcli.evaluation.network import Classifier
from sslcli.evaluation.result import label_rank
from sslcli.evaluation.task import FineTuned, Start, Task
from sslcli.evaluation.training import Recipe, batches, cross_entropy, fit, predict
from sslcli.evaluation.variants import join_parts
from sslcli.methods.base import Batch, num_features
from sslcli.nn.modes import evaluating
from sslcli.report.console import Progress

TEACHERS = ("finetune", "semi")


def distillation(student: Tensor, teacher: Tensor, *, temperature: float, scale: bool = True) -> Tensor:
    """Return the cross-entropy of the student's logits (N, C) and the teacher's probabilities, both at `temperature`.

    The loss is the mean over N of -sum p_teacher log p_student (SimCLR v2, eq. 2). If `scale` is True, the loss is
    multiplied by temperature squared, as in the official notebook. The gradient magnitude is then independent of the
    temperature. No gradient flows to the teacher.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    target = (teacher.detach().to(dtype) / temperature).softmax(1)
    loss = -(target * (student.to(dtype) / temperature).log_softmax(1)).sum(1).mean()
    return loss * temperature**2 if scale else loss


@dataclass(frozen=True, kw_only=True)
class Distill(Recipe):
    """The protocol `distill`. The learning rate is fixed and not selected from a grid.

    The baseline `random` is a randomly initialized student. It is trained on the teacher's labeled images, without the
    teacher, for the same number of steps as the distilled student.
    """

    shares_work: ClassVar[bool] = True
    named: ClassVar[dict[str, Any]] = {"alpha": 1.0, "steps": 600, "batch_norm": "train", "seed": 0}

    teacher: str = "finetune"
    student: nn.Module | None = None
    lr: float = 0.1
    temperature: float = 1.0
    scale: bool = True
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher.partition("_")[0] not in TEACHERS:
            raise ValueError(
                f"teacher={self.teacher!r} is unknown: choose {' or '.join(TEACHERS)}, or the name of a result of one "
                "of them, as in semi_1pct"
            )
        if not self.lr > 0 or not self.temperature > 0:
            raise ValueError(f"lr={self.lr} and temperature={self.temperature} must be above 0")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be above 0 and at most 1; 1 uses no labels")

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the result's name, with the student and the settings that are not at their defaults.

        The student is written as its class name and a digest of its layers. If it is the run's network, it is left out.
        Of the other settings, only the keys of the class attribute `named` can be part of the suffix. `monitor` has no
        effect.
        """
        digest = hashlib.sha256(repr(self.student).encode()).hexdigest()[:6]
        student = "" if self.student is None else f"student-{type(self.student).__name__}-{digest}"
        return join_parts(student, super().variant(monitor))

    def description(self, result: Mapping[str, Any]) -> str:
        """Return one line that names the other accuracies to which the accuracy in `result` can be compared."""
        return (
            f"student of the teacher {result['teacher']['measured']} ({result['n_labels']:,} labels), "
            f"{trained_and_measured(result)} without labels: compare with the accuracy of the teacher"
        )

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Distill the teacher into a copy of the run's network.

        If `student` is set, distill into this randomly initialized network instead. With several processes, rank 0
        distills, and rank 1 trains the baseline. The network of the outcome is that of rank 0.
        """
        teacher = task.fine_tuned(self.teacher)
        data = starts["trained"].features
        split, _, labels = data.reported()
        at = reported_positions(data)
        arms = {
            name: start.classifier(task) if self.student is None else self.fresh(start, task)
            for name, start in starts.items()
        }
        progress = Progress(task.screen, "distilling", total=shared_work.own_jobs(len(arms)) * self.steps)
        student = arms["trained"]

        def distilled() -> Tensor:
            self.distil(student, teacher, task, split, progress)
            return label_rank(predict(student, task, at), labels)

        def alone() -> Tensor:
            net, facts = arms["random"], "labels alone"
            fit(net, task, teacher.positions, self, lr=self.lr, seed=self.seed, progress=progress, facts=facts)
            return label_rank(predict(net, task, at), labels)

        jobs = {"trained": distilled, **({"random": alone} if "random" in arms else {})}
        jobs["teacher"] = lambda: label_rank(predict(teacher.net, task, at), labels)
        places = dict(zip(jobs, shared_work.spread(list(jobs.values())), strict=True))
        result = {
            "protocol": "distill",
            "split": split,
            **self.numbers(places["trained"], data.num_classes),
            "teacher": teacher.provenance | self.numbers(places["teacher"], data.num_classes),
            "student": "the run's own net" if self.student is None else type(self.student).__name__,
            "n_train": len(task.source.without_labels_of(split)),
            "n_labels": len(teacher.positions),
            "n_test": len(at),
            "num_classes": data.num_classes,
            **self.facts(),
        }
        if "random" in arms:
            result["baselines"] = {"random": self.numbers(places["random"], data.num_classes)}
        task.screen.stop()
        source = teacher.provenance["measured"]
        variant = source if source != Distill.teacher else ""
        return Outcome(result=result, net=student, positions=teacher.positions, variant=variant)

    def fresh(self, start: Start, task: Task) -> Classifier:
        """Return the randomly initialized network of the setting `student`, with a linear classifier.

        Raises ValueError if the student does not accept the images.
        """
        assert self.student is not None
        dry_output(self.student, image_size=task.source.image_size, in_channels=task.source.channels)
        student = Start(net=self.student.to(task.device), layer=BACKBONE, features=start.features)
        return student.classifier(task, width=num_features(self.student))

    def distil(self, student: Classifier, teacher: FineTuned, task: Task, split: str, progress: Progress) -> None:
        """Train the student on all training images that are not in the reported split `split`.

        The student and the teacher get the same views.
        """
        with evaluating(teacher.net), closing(self.labeled(teacher, task)) as labeled:

            def loss(net: Classifier, batch: Batch) -> Tensor:
                with torch.no_grad():
                    logits = teacher.net(batch.views[0])
                soft = distillation(net(batch.views[0]), logits, temperature=self.temperature, scale=self.scale)
                if self.alpha == 1:
                    return soft
                return self.alpha * soft + (1 - self.alpha) * cross_entropy(net, next(labeled))

            # Images of the reported split are excluded, although training does not use their labels.
            everything = task.source.without_labels_of(split)
            fit(student, task, everything, self, lr=self.lr, seed=self.seed, progress=progress, loss=loss)

    def labeled(self, teacher: FineTuned, task: Task) -> Generator[Batch, None, None]:
        """Yield one batch of labeled images per training step (`self.steps` batches).

        The labeled images are those that the teacher was fine-tuned on.
        """
        views = self.views(task)
        loader = batches(task, teacher.positions, views, batch_size=self.batch_size, seed=self.seed + 1)
        with closing(loader.steps(0, self.steps)) as steps:
            for (batch,) in steps:
                yield batch
