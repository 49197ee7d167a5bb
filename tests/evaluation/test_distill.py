"""A student learns from a teacher's probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.evaluation.distill import Distill, distillation
from sslcli.evaluation.finetune import Finetune
from sslcli.evaluation.task import FineTuned, Start, Task
from tiny import TinyNet

QUICK: dict[str, Any] = {"steps": 30, "batch_size": 20, "lr": 0.5}


def logits(seed: int = 0) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_student_equal_to_its_teacher_has_the_entropy_as_loss_and_no_gradient() -> None:
    student, teacher = logits().requires_grad_(), logits().requires_grad_()
    loss = distillation(student, teacher, temperature=1.0)
    loss.backward()
    p = logits().softmax(1)
    torch.testing.assert_close(loss, -(p * p.log()).sum(1).mean())
    assert student.grad.abs().max() < 1e-12
    assert teacher.grad is None


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_the_loss_is_the_cross_entropy_of_torch_at_a_temperature(temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    wanted = F.cross_entropy(student / temperature, (teacher / temperature).softmax(1))
    torch.testing.assert_close(distillation(student, teacher, temperature=temperature, scale=False), wanted)
    scaled = distillation(student, teacher, temperature=temperature)
    torch.testing.assert_close(scaled, wanted * temperature**2)


def test_a_cold_teacher_gives_hard_labels() -> None:
    student, teacher = logits(1), 100 * logits(2)
    cold = distillation(student, teacher, temperature=1e-3, scale=False)
    hard = F.cross_entropy(student / 1e-3, teacher.argmax(1))
    torch.testing.assert_close(cold, hard)


@pytest.fixture(scope="module")
def teacher(task: Task, starts: dict[str, Start]) -> FineTuned:
    found = Finetune(steps=20, batch_size=16, lrs=[0.5])({"trained": starts["trained"]}, task)
    assert found.net is not None
    assert found.positions is not None
    provenance = {"protocol": "finetune", "measured": "finetune"}
    return FineTuned(net=found.net, positions=found.positions[:6], provenance=provenance)


def test_a_student_reaches_its_teacher_without_seeing_a_label(
    task: Task, starts: dict[str, Start], teacher: FineTuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in teacher.net.state_dict().items()}
    monkeypatch.setattr(task.source, "labels", torch.where(torch.arange(90) < 60, -1, task.source.labels))
    result = Distill(**QUICK)({"trained": starts["trained"]}, replace(task, fine_tuned=lambda wanted: teacher)).result
    assert "without labels: compare with the accuracy of the teacher" in Distill(**QUICK).description(result)
    assert result["teacher"]["top1"] > 0.6
    assert result["top1"] > result["teacher"]["top1"] - 0.15
    assert (result["n_train"], result["n_labels"]) == (60, 6)
    assert all(torch.equal(value, before[name]) for name, value in teacher.net.state_dict().items())


def test_the_baseline_is_the_student_on_the_labels_alone(
    task: Task, starts: dict[str, Start], teacher: FineTuned
) -> None:
    both = Distill(**QUICK)(starts, replace(task, fine_tuned=lambda wanted: teacher)).result
    alone = Distill(**QUICK)({"trained": starts["trained"]}, replace(task, fine_tuned=lambda wanted: teacher)).result
    assert both["baselines"].keys() == {"random"}
    assert {key: value for key, value in both.items() if key != "baselines"} == alone


def test_a_student_may_be_another_net_and_may_see_labels_too(
    task: Task, starts: dict[str, Start], teacher: FineTuned
) -> None:
    torch.manual_seed(5)
    student = TinyNet(norm=False)
    found = Distill(**QUICK, student=student, alpha=0.5)(starts, replace(task, fine_tuned=lambda wanted: teacher))
    assert found.result["student"] == "TinyNet"
    assert "norm.weight" not in found.net.net.state_dict()
    other = Distill(**QUICK, student=student, alpha=1.0)(starts, replace(task, fine_tuned=lambda wanted: teacher))
    assert not torch.equal(found.net.classify.weight, other.net.classify.weight)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({"teacher": "knn"}, "finetune or semi"), ({"lr": 0.0}, "above 0"), ({"alpha": 0.0}, "no labels")],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Distill(**settings)
