from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_cases import Case, golden_cases
from sslcli.methods.base import Batch
from sslcli.methods.byol import BYOL, byol_loss
from sslcli.nn.batch_norm import SyncBatchNorm
from tiny import TinyNet, make_batch


def tiny_byol(**changes: object) -> BYOL:
    return BYOL(TinyNet(), **({"dim": 4, "hidden": 16} | changes))


@golden_cases("byol_loss")
def test_loss_and_gradients_equal_the_official_code(case: Case) -> None:
    p1, p2, z1, z2 = (case.inputs[name].requires_grad_() for name in ("p1", "p2", "z1", "z2"))
    loss = byol_loss(p1, p2, z1, z2)
    loss.backward()
    case.check(loss, "loss")
    case.check(p1.grad, "grad_p1")
    case.check(p2.grad, "grad_p2")
    assert z1.grad is None
    assert z2.grad is None
    rows = [byol_loss(*(x[i : i + 1] for x in (p1, p2, z1, z2))) for i in range(len(p1))]
    case.check(rows, "loss_per_sample")


def test_loss_is_the_sum_over_directions_of_the_distance_of_unit_vectors() -> None:
    p1, p2, z1, z2 = torch.randn(4, 5, 3, dtype=torch.float64)
    expected = 0.0
    for i in range(5):
        for p, z in ((p1[i], z2[i]), (p2[i], z1[i])):
            expected += (p / p.norm() - z / z.norm()).square().sum() / 5
    torch.testing.assert_close(byol_loss(p1, p2, z1, z2), expected)


def test_loss_is_zero_where_predictions_point_to_their_targets_and_eight_where_they_point_away() -> None:
    z1, z2 = torch.randn(2, 5, 3, dtype=torch.float64)
    assert float(byol_loss(2 * z2, 3 * z1, z1, z2)) == pytest.approx(0.0, abs=1e-12)
    assert float(byol_loss(-z2, -z1, z1, z2)) == pytest.approx(8.0)


def test_swapping_the_views_changes_nothing() -> None:
    p1, p2, z1, z2 = torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(byol_loss(p2, p1, z2, z1), byol_loss(p1, p2, z1, z2))


def test_gradient_turns_a_prediction_without_changing_its_length() -> None:
    p1, p2, z1, z2 = torch.randn(4, 5, 3, dtype=torch.float64)
    p1.requires_grad_()
    byol_loss(p1, p2, z1, z2).backward()
    torch.testing.assert_close((p1.grad * p1).sum(1), torch.zeros(5, dtype=torch.float64))
    assert (p1.grad.norm(dim=1) > 1e-3).all()


def test_gradient_is_four_times_that_of_the_mean_of_both_negative_cosines() -> None:  # lightly's loss: cifar10_byol
    p1, p2, z1, z2 = torch.randn(4, 5, 3, dtype=torch.float64)
    inputs = (p1.requires_grad_(), p2.requires_grad_())
    ours = torch.autograd.grad(byol_loss(p1, p2, z1, z2), inputs)
    mean = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2
    theirs = torch.autograd.grad(mean, inputs)
    torch.testing.assert_close(ours, tuple(4 * grad for grad in theirs))


def test_each_view_is_predicted_from_the_other_by_both_networks() -> None:
    method, batch = tiny_byol(), make_batch()
    with torch.no_grad():
        for parameter in method.target_projector.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = torch.zeros(())
    for x, other in (batch.views, batch.views[::-1]):
        prediction = F.normalize(method.predictor(method.projector(method.backbone(x))), dim=1)
        target = F.normalize(method.target_projector(method.target_backbone(other)), dim=1)
        expected = expected + (prediction - target).square().sum(1).mean()
    torch.testing.assert_close(method(batch)["loss"], expected)
    torch.testing.assert_close(method(Batch(batch.views[::-1], batch.index, batch.label))["loss"], expected)


def test_heads_are_those_of_the_official_code() -> None:
    method = tiny_byol()
    for head, width in ((method.projector, 8), (method.predictor, 4), (method.target_projector, 8)):
        first, norm, relu, last = head
        assert (first.in_features, first.out_features, first.bias is not None) == (width, 16, True)
        assert (type(norm), norm.affine, type(relu)) == (SyncBatchNorm, True, nn.ReLU)
        assert (last.in_features, last.out_features, last.bias) == (16, 4, None)


def test_target_is_a_copy_without_predictor_that_takes_no_gradient() -> None:
    method = tiny_byol()
    state = method.state_dict()
    target = {n: value for n, value in state.items() if n.startswith("target_")}
    assert set(target) == {f"target_{n}" for n in state if n.startswith(("backbone", "projector"))}
    assert all(torch.equal(value, state[n.removeprefix("target_")]) for n, value in target.items())
    method(make_batch())["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("target_")


def test_target_follows_with_the_scheduled_momentum_and_stands_still_at_the_end() -> None:
    method, total = tiny_byol(momentum=0.8), 5
    start = method.projector[0].weight.detach().clone()
    online, momenta = [], []
    for step in range(total):
        with torch.no_grad():
            method.projector[0].weight.add_(torch.randn(16, 8))
        method.after_step(step / total)
        online.append(method.projector[0].weight.detach().clone())
        momenta.append(1 - (1 - 0.8) * (1 + math.cos(math.pi * step / total)) / 2)
    expected = math.prod(momenta) * start
    for i in range(total):
        expected = expected + (1 - momenta[i]) * math.prod(momenta[i + 1 :]) * online[i]
    torch.testing.assert_close(method.target_projector[0].weight.data, expected)
    method.after_step(1.0)
    torch.testing.assert_close(method.target_projector[0].weight.data, expected)


def test_statistics_of_the_target_come_from_its_own_batches_and_are_not_averaged() -> None:
    method, batch = tiny_byol(), make_batch()
    before = method.target_backbone.norm.running_mean.clone()
    with torch.no_grad():
        method.target_backbone.conv.weight.neg_()
    method(batch)
    own, online = method.target_backbone.norm.running_mean.clone(), method.backbone.norm.running_mean
    assert not torch.equal(own, before)
    torch.testing.assert_close(own, -online)
    method.after_step(0.0)
    assert torch.equal(method.target_backbone.norm.running_mean, own)


def test_without_predictor_the_projections_themselves_are_compared() -> None:
    method, batch = tiny_byol(predictor=False), make_batch()
    p1, p2 = (method.projection(x) for x in batch.views)
    z1, z2 = (method.target(x) for x in batch.views)
    torch.testing.assert_close(method(batch)["loss"], byol_loss(p1, p2, z1, z2))
    assert not any(n.startswith("predictor") for n, _ in method.named_parameters())


def test_every_batchnorm_is_synchronized() -> None:
    norms = [m for m in tiny_byol().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2 * 2 + 1
    assert all(type(m) is SyncBatchNorm for m in norms)


def test_a_final_momentum_equal_to_the_first_gives_a_constant_momentum() -> None:
    method = tiny_byol(momentum=0.8, final_momentum=0.8)
    assert [method.scheduled(t / 4)["EMA momentum"] for t in range(5)] == [0.8] * 5
    assert tiny_byol(momentum=0.8, final_momentum=0.9).scheduled(1.0)["EMA momentum"] == 0.9
    assert tiny_byol(momentum=0.8).scheduled(1.0)["EMA momentum"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 1.1}, r"momentum is 1\.1"),
        ({"momentum": 0.9, "final_momentum": 0.8}, r"final_momentum is 0\.8, .* choose a value from 0\.9 to 1"),
    ],
)
def test_impossible_momentum_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_byol(**changes)
