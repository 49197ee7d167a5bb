from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_cases import Case, golden_cases
from sslcli.methods.ressl import ReSSL, relation_loss
from sslcli.nn.queue import enqueue
from tiny import TinyNet, make_batch


def tiny_ressl(**changes: float) -> ReSSL:
    return ReSSL(TinyNet(), **({"dim": 4, "hidden": 10, "queue_size": 12} | changes))  # type: ignore[arg-type]


@golden_cases("ressl")
def test_steps_equal_public_code(case: Case) -> None:
    x, params = case.inputs, case.params
    queue, head = x["queue0"], torch.tensor(0)
    losses, gradients, queues, heads = [], [], [], []
    for query, key in zip(x["q"], x["k"], strict=True):
        query = query.clone().requires_grad_()
        loss, _ = relation_loss(
            query, key, queue, temperature=params["temperature_q"], teacher_temperature=params["temperature_k"]
        )
        loss.backward()
        enqueue(queue, head, key)
        losses.append(loss.detach())
        gradients.append(query.grad)
        queues.append(queue.clone())
        heads.append(head.clone())
    case.check(losses, "loss")
    case.check(gradients, "grad_q")  # type: ignore[arg-type]
    case.check(queues, "queue")
    assert [int(h) for h in heads] == case.outputs["ptr"].tolist()


def test_equal_relations_cost_their_entropy() -> None:
    query, queue = (F.normalize(torch.randn(n, 4, dtype=torch.float64), dim=1) for n in (3, 7))
    loss, divergence = relation_loss(query, query, queue, temperature=0.2, teacher_temperature=0.2)
    share = (query @ queue.T / 0.2).softmax(1)
    torch.testing.assert_close(loss, -(share * share.log()).sum(1).mean())
    assert float(divergence) == pytest.approx(0, abs=1e-12)


def test_divergence_is_that_of_kullback_and_leibler_without_gradient() -> None:
    query, key, queue = (F.normalize(torch.randn(n, 4, dtype=torch.float64), dim=1) for n in (3, 3, 7))
    query.requires_grad_()
    _, divergence = relation_loss(query, key, queue, temperature=0.2, teacher_temperature=0.1)
    target, found = (key @ queue.T / 0.1).softmax(1), (query @ queue.T / 0.2).log_softmax(1)
    torch.testing.assert_close(divergence, F.kl_div(found, target, reduction="batchmean").detach())
    assert not divergence.requires_grad


def test_a_collapsed_queue_costs_the_logarithm_of_its_length() -> None:
    query, queue = torch.randn(3, 4), torch.ones(7, 4) / 2
    loss, _ = relation_loss(query, query, queue, temperature=0.1, teacher_temperature=0.04)
    assert float(loss) == pytest.approx(math.log(7), abs=1e-5)


def test_student_gets_the_strong_view_and_teacher_the_weak_one() -> None:
    method, batch = tiny_ressl(), make_batch()
    found = method(batch)["loss"]
    query = F.normalize(method.projection(batch.views[0]), dim=1)
    key = F.normalize(method.teacher_projector(method.teacher_backbone(batch.views[1])), dim=1)
    expected, _ = relation_loss(query, key, method.queue, temperature=0.1, teacher_temperature=0.04)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None for p in method.teacher_backbone.parameters())
    assert all(p.grad is not None for p in method.backbone.parameters())


def test_a_step_moves_the_teacher_and_enqueues_its_keys() -> None:
    method, batch = tiny_ressl(momentum=0.9), make_batch()
    method(batch)
    keys = method.embeddings[1]
    teacher = copy.deepcopy(method.teacher_projector)
    with torch.no_grad():
        for parameter in method.projector.parameters():
            parameter.add_(1.0)
    method.after_step(0.0)
    for now, before in zip(method.teacher_projector.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(now, before + 0.1)
    torch.testing.assert_close(method.queue[:8], keys)
    assert int(method.queue_head) == 8
    assert method.scheduled(1.0)["EMA momentum"] == 1.0


def test_projector_has_no_batchnorm() -> None:
    assert [type(layer) for layer in tiny_ressl().projector] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_temperature": 0.1}, "teacher_temperature is 0.1, but it must be below temperature=0.1"),
        ({"teacher_temperature": 0.0}, "temperature is 0.0"),
        ({"queue_size": 0}, "queue_size"),
        ({"momentum": 1.5}, "momentum is 1.5"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_ressl(**changes)
