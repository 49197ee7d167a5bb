from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.methods.base import Batch
from sslcli.methods.moco_v3 import MoCoV3, contrast
from sslcli.nn.batch_norm import SyncBatchNorm
from tiny import TinyNet, make_batch


def tiny_moco_v3(**changes: object) -> MoCoV3:
    return MoCoV3(TinyNet(), **({"dim": 4, "hidden": 16, "temperature": 0.2} | changes))


def layers(head: nn.Sequential) -> list[tuple]:
    """What a head is made of: linear (in, out, bias), BatchNorm (width, affine), ReLU."""
    return [
        (m.in_features, m.out_features, m.bias is not None)
        if isinstance(m, nn.Linear)
        else (m.num_features, m.affine)
        if isinstance(m, SyncBatchNorm)
        else (type(m),)
        for m in head
    ]


@golden_cases("mocov3_loss")
def test_loss_and_gradients_equal_the_official_code(case: Case) -> None:
    x, temperature = case.inputs, case.params["temperature"]
    for name in x:
        x[name].requires_grad_()
    first = contrast(x["q1"], x["k2"], temperature=temperature).loss
    second = contrast(x["q2"], x["k1"], temperature=temperature).loss
    (first + second).backward()
    case.check(first + second, "loss")
    case.check(first, "loss_q1k2")
    case.check(second, "loss_q2k1")
    case.check(x["q1"].grad, "grad_q1")
    case.check(x["q2"].grad, "grad_q2")
    assert x["k1"].grad is None
    assert x["k2"].grad is None


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_contrast_is_two_tau_times_the_cross_entropy_over_all_keys_of_the_view(temperature: float) -> None:
    query, key = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = 0.0
    for i in range(5):
        logits = torch.stack([F.cosine_similarity(query[i], key[j], dim=0) for j in range(5)]) / temperature
        expected += 2 * temperature * F.cross_entropy(logits[None], torch.tensor([i])) / 5
    torch.testing.assert_close(contrast(query, key, temperature=temperature).loss, expected)


def test_each_view_predicts_the_keys_of_the_other() -> None:
    method, batch = tiny_moco_v3(), make_batch()
    (q1, k1), (q2, k2) = ((method.predict(x), method.target(x)) for x in batch.views)
    expected = contrast(q1, k2, temperature=0.2).loss + contrast(q2, k1, temperature=0.2).loss
    torch.testing.assert_close(method(batch)["loss"], expected)
    swapped = method(Batch(batch.views[::-1], batch.index, batch.label))["loss"]
    torch.testing.assert_close(swapped, expected)


def test_resnet_heads_are_those_of_the_official_code() -> None:
    method = tiny_moco_v3()
    assert layers(method.projector) == [(8, 16, False), (16, True), (nn.ReLU,), (16, 4, False), (4, False)]
    assert layers(method.predictor) == [(4, 16, False), (16, True), (nn.ReLU,), (16, 4, False)]


def test_vit_heads_are_those_of_the_official_code() -> None:
    method = tiny_moco_v3(projector_layers=3, predictor_norm=True)
    hidden = [(8, 16, False), (16, True), (nn.ReLU,), (16, 16, False), (16, True), (nn.ReLU,)]
    assert layers(method.projector) == [*hidden, (16, 4, False), (4, False)]
    assert layers(method.predictor) == [(4, 16, False), (16, True), (nn.ReLU,), (16, 4, False), (4, False)]
    assert layers(method.momentum_projector) == layers(method.projector)


def test_momentum_encoder_copies_backbone_and_projector_but_not_the_predictor_and_takes_no_gradient() -> None:
    method = tiny_moco_v3()
    target = {n for n, p in method.named_parameters() if not p.requires_grad}
    online = {n for n, p in method.named_parameters() if p.requires_grad}
    assert target == {f"momentum_{n}" for n in online if not n.startswith("predictor")}
    method(make_batch())["loss"].backward()
    assert {n for n, p in method.named_parameters() if p.grad is not None} == online


def test_momentum_encoder_follows_with_a_momentum_that_rises_to_one_by_a_cosine() -> None:
    method, total = tiny_moco_v3(momentum=0.9), 4
    expected = method.projector[0].weight.detach().clone()
    for step in range(total):
        with torch.no_grad():
            method.projector[0].weight.add_(torch.randn(16, 8))
        method.after_step(step / total)
        momentum = 1 - (1 - 0.9) * (1 + math.cos(math.pi * step / total)) / 2
        expected = momentum * expected + (1 - momentum) * method.projector[0].weight.detach()
        torch.testing.assert_close(method.momentum_projector[0].weight.data, expected)
    method.after_step(1.0)
    torch.testing.assert_close(method.momentum_projector[0].weight.data, expected)


def test_every_batchnorm_is_synchronized() -> None:
    norms = [m for m in tiny_moco_v3().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2 * 3 + 1
    assert all(type(m) is SyncBatchNorm for m in norms)


def contrast_of_a_part(query: Tensor, key: Tensor, rank_rows: int) -> tuple[Tensor, Tensor]:
    rows = slice(torch.distributed.get_rank() * rank_rows, (torch.distributed.get_rank() + 1) * rank_rows)
    mine = query[rows].requires_grad_()
    loss = contrast(mine, key[rows], temperature=0.2).loss
    loss.backward()
    return loss.detach(), mine.grad / 2  # processes average their gradients


def test_the_momentum_ends_at_its_final_value() -> None:
    assert tiny_moco_v3(momentum=0.9, final_momentum=0.95).scheduled(1.0)["EMA momentum"] == 0.95
    assert tiny_moco_v3(momentum=0.9).scheduled(1.0)["EMA momentum"] == 1.0


def test_two_processes_contrast_against_the_keys_of_both(pair: Pair) -> None:
    query, key = torch.randn(2, 6, 4, dtype=torch.float64)
    parts = pair.run(contrast_of_a_part, query, key, 3)
    query.requires_grad_()
    whole = contrast(query, key, temperature=0.2).loss
    whole.backward()
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, whole.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), query.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_layers": 1}, "projector_layers is 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"momentum": 0.9, "final_momentum": 1.5}, "final_momentum is 1.5"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_moco_v3(**changes)
