from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair, my_half
from sslcli.methods.simclr import SimCLR, debiased_nt_xent, decoupled_nt_xent, nt_xent
from sslcli.nn.batch_norm import SyncBatchNorm
from tiny import TinyNet, make_batch


def tiny_simclr(**changes: object) -> SimCLR:
    return SimCLR(TinyNet(), **({"dim": 4, "temperature": 0.5} | changes))


@golden_cases("simclr_ntxent")
def test_loss_and_gradients_equal_the_official_code(case: Case) -> None:
    z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
    loss = nt_xent(z1, z2, temperature=case.params["temperature"]).loss
    loss.backward()
    case.check(loss, "loss")
    case.check(2 * loss, "loss_sum_of_views")  # Google's code does not halve
    case.check(z1.grad, "grad_z1")
    case.check(z2.grad, "grad_z2")


@golden_cases("dcl_")
def test_decoupled_losses_and_gradients_equal_public_code(case: Case) -> None:
    for name, sigma in (("dcl", None), ("dclw", case.params["sigma"])):
        z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
        loss = decoupled_nt_xent(z1, z2, temperature=case.params["temperature"], sigma=sigma).loss
        loss.backward()
        case.check(loss, f"loss_{name}")
        case.check(z1.grad, f"grad_z1_{name}")
        case.check(z2.grad, f"grad_z2_{name}")


@golden_cases("dclw_variants")
def test_weighted_decoupled_loss_equals_lightly(case: Case) -> None:
    z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
    loss = decoupled_nt_xent(z1, z2, temperature=case.params["temperature"], sigma=case.params["sigma"]).loss
    loss.backward()
    case.check(loss, "loss_dclw")
    case.check((case.outputs["loss_dclw_12"] + case.outputs["loss_dclw_21"]) / 2, "loss_dclw")
    case.check(z1.grad, "grad_z1")


def check_debiased(case: Case, hardness: float) -> None:
    z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
    values = {"temperature": case.params["temperature"], "same_class": case.params["tau_plus"], "hardness": hardness}
    loss = debiased_nt_xent(z1, z2, **values).loss
    gradients = torch.autograd.grad(loss, (z1, z2))
    case.check(loss, "loss")
    # The official gradient is that of unit vectors, and this function normalizes: compare the tangential parts.
    for z, gradient, name in zip((z1, z2), gradients, ("grad_z1", "grad_z2"), strict=True):
        official = case.outputs[name]
        tangential = official - (official * z).sum(1, keepdim=True) * z
        torch.testing.assert_close(gradient, tangential.detach(), rtol=1e-4, atol=1e-5)


@golden_cases("debiased")
def test_debiased_loss_equals_the_official_code(case: Case) -> None:
    check_debiased(case, hardness=0.0)


@golden_cases("hcl")
def test_loss_with_hard_negatives_equals_the_official_code(case: Case) -> None:
    check_debiased(case, hardness=case.params["beta"])


def test_without_debiasing_and_hardness_the_loss_is_that_of_simclr() -> None:
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)
    found = debiased_nt_xent(z1, z2, temperature=0.3, same_class=0.0, hardness=0.0)
    torch.testing.assert_close(found.loss, nt_xent(z1, z2, temperature=0.3).loss)
    torch.testing.assert_close(found.accuracy, nt_xent(z1, z2, temperature=0.3).accuracy)


def test_a_method_with_hard_negatives_computes_the_loss_from_its_embeddings() -> None:
    method, batch = tiny_simclr(same_class=0.1, hardness=0.7), make_batch()
    z1, z2 = method.embed(batch)
    expected = debiased_nt_xent(z1, z2, temperature=0.5, same_class=0.1, hardness=0.7).loss
    torch.testing.assert_close(method.compare((z1, z2))["loss"], expected)


def debiased_of_a_part(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = my_half(z1).requires_grad_(), my_half(z2).requires_grad_()
    loss = debiased_nt_xent(a, b, temperature=0.5, same_class=0.1, hardness=1.0).loss
    loss.backward()
    assert a.grad is not None
    assert b.grad is not None
    return loss.detach(), a.grad / 2, b.grad / 2  # processes average their gradients


def test_two_processes_compute_the_debiased_loss_of_the_whole_batch(pair: Pair) -> None:
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)
    (loss1, *first), (loss2, *second) = pair.run(debiased_of_a_part, z1, z2)
    z1.requires_grad_()
    z2.requires_grad_()
    whole = debiased_nt_xent(z1, z2, temperature=0.5, same_class=0.1, hardness=1.0).loss
    whole.backward()
    torch.testing.assert_close((loss1 + loss2) / 2, whole.detach())
    for z, *parts in zip((z1, z2), first, second, strict=True):
        torch.testing.assert_close(torch.cat(parts), z.grad)


def test_decoupled_loss_lacks_the_positive_in_the_denominator() -> None:
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)
    rows = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (rows @ rows.T / 0.3).fill_diagonal_(-torch.inf)
    share = logits.softmax(1)[torch.arange(12), torch.arange(12).roll(6)]  # of the positive
    explicit = nt_xent_of_anchors(logits) + torch.log1p(-share)
    torch.testing.assert_close(decoupled_nt_xent(z1, z2, temperature=0.3).loss, explicit.mean())


def nt_xent_of_anchors(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)).roll(len(logits) // 2), reduction="none")


def test_decoupled_gradient_of_two_images_is_finite() -> None:
    z1, z2 = torch.randn(2, 2, 4, requires_grad=True).unbind()
    assert torch.autograd.grad(decoupled_nt_xent(z1, z2, temperature=0.1, sigma=0.5).loss, z1)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["unweighted", "weighted"])
def test_a_method_with_the_decoupled_loss_computes_it_from_its_embeddings(kind: str) -> None:
    method, batch = tiny_simclr(decoupled=kind, sigma=0.3), make_batch()
    z1, z2 = method.embed(batch)
    expected = decoupled_nt_xent(z1, z2, temperature=0.5, sigma=0.3 if kind == "weighted" else None).loss
    torch.testing.assert_close(method.compare((z1, z2))["loss"], expected)
    assert float(expected.detach()) != pytest.approx(float(nt_xent(z1, z2, temperature=0.5).loss.detach()))


def decoupled_of_a_part(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = my_half(z1).requires_grad_(), my_half(z2).requires_grad_()
    loss = decoupled_nt_xent(a, b, temperature=0.2, sigma=0.5).loss
    loss.backward()
    assert a.grad is not None
    assert b.grad is not None
    return loss.detach(), a.grad / 2, b.grad / 2  # processes average their gradients


def test_two_processes_compute_the_weighted_decoupled_loss_of_the_whole_batch(pair: Pair) -> None:
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)
    (loss1, *first), (loss2, *second) = pair.run(decoupled_of_a_part, z1, z2)
    z1.requires_grad_()
    z2.requires_grad_()
    whole = decoupled_nt_xent(z1, z2, temperature=0.2, sigma=0.5).loss
    whole.backward()
    torch.testing.assert_close((loss1 + loss2) / 2, whole.detach())
    for z, *parts in zip((z1, z2), first, second, strict=True):
        torch.testing.assert_close(torch.cat(parts), z.grad)


def test_loss_is_the_mean_over_both_views_of_the_explicit_cross_entropy() -> None:
    z1, z2 = torch.randn(2, 5, 4, dtype=torch.float64)
    z = torch.cat([z1, z2])
    total = 0.0
    for i in range(10):
        similar = [torch.exp(F.cosine_similarity(z[i], z[k], dim=0) / 0.3) for k in range(10) if k != i]
        positive = torch.exp(F.cosine_similarity(z[i], z[(i + 5) % 10], dim=0) / 0.3)
        total -= torch.log(positive / sum(similar))
    torch.testing.assert_close(nt_xent(z1, z2, temperature=0.3).loss, total / 10)


def test_equal_embeddings_are_a_guess_among_all_other_views() -> None:
    z = torch.ones(6, 4, dtype=torch.float64)
    loss, accuracy = nt_xent(z, z, temperature=0.1)
    assert float(loss) == pytest.approx(math.log(2 * 6 - 1))
    assert float(accuracy) == 0.0


def test_accuracy_is_the_share_of_views_nearest_to_their_twin() -> None:
    axes = torch.eye(4)
    assert float(nt_xent(axes, axes, temperature=0.1).accuracy) == 1.0
    swapped = axes[[1, 0, 2, 3]]  # the twins of two images are each other's
    assert float(nt_xent(axes, swapped, temperature=0.1).accuracy) == 0.5


def test_order_of_images_and_views_and_length_of_embeddings_do_not_matter() -> None:
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)
    loss = nt_xent(z1, z2, temperature=0.2).loss
    order = torch.randperm(6)
    torch.testing.assert_close(nt_xent(z1[order], z2[order], temperature=0.2).loss, loss)
    torch.testing.assert_close(nt_xent(z2, z1, temperature=0.2).loss, loss)
    torch.testing.assert_close(nt_xent(3 * z1, z2 / 7, temperature=0.2).loss, loss)


def test_head_has_batchnorm_after_every_layer_and_no_shift_after_the_last() -> None:
    first, norm, relu, last, last_norm = tiny_simclr().head
    assert (first.in_features, first.out_features, first.bias) == (8, 8, None)
    assert type(norm) is SyncBatchNorm
    assert norm.weight is not None
    assert norm.bias is not None
    assert type(relu) is nn.ReLU
    assert (last.in_features, last.out_features, last.bias) == (8, 4, None)
    assert type(last_norm) is SyncBatchNorm
    assert last_norm.weight is not None
    assert last_norm.bias is None


def test_head_of_three_layers_is_that_of_the_second_version() -> None:
    linear = [m for m in tiny_simclr(layers=3).head if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(8, 8), (8, 8), (8, 4)]
    assert sum(isinstance(m, SyncBatchNorm) for m in tiny_simclr(layers=3).head) == 3


def test_head_without_batchnorm_has_biases() -> None:
    head = tiny_simclr(norm=False, hidden=16).head
    assert [type(m) for m in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(m.bias is not None for m in head if isinstance(m, nn.Linear))
    assert head[0].out_features == 16


def test_weights_of_the_head_start_as_small_as_they_are_asked_to() -> None:
    head = SimCLR(TinyNet(), dim=256, hidden=256, init_std=0.01).head
    assert float(head[3].weight.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_loss_is_that_of_the_projections_and_every_batchnorm_is_synchronized() -> None:
    method, batch = tiny_simclr(), make_batch()
    z1, z2 = (method.head(method.backbone(view)) for view in batch.views)
    torch.testing.assert_close(method(batch)["loss"], nt_xent(z1, z2, temperature=0.5).loss)
    torch.testing.assert_close(method.embeddings, (z1.detach(), z2.detach()))
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 3
    assert all(type(m) is SyncBatchNorm for m in norms)


def nt_xent_of_a_part(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half = len(z1) // 2
    rows = slice(torch.distributed.get_rank() * half, (torch.distributed.get_rank() + 1) * half)
    a, b = z1[rows].clone().requires_grad_(), z2[rows].clone().requires_grad_()
    loss = nt_xent(a, b, temperature=0.2).loss
    loss.backward()
    return loss.detach(), a.grad / 2, b.grad / 2  # processes average their gradients


def test_two_processes_compute_the_loss_and_gradient_of_the_whole_batch(pair: Pair) -> None:
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)
    (loss1, *first), (loss2, *second) = pair.run(nt_xent_of_a_part, z1, z2)
    z1.requires_grad_()
    z2.requires_grad_()
    whole = nt_xent(z1, z2, temperature=0.2).loss
    whole.backward()
    torch.testing.assert_close((loss1 + loss2) / 2, whole.detach())
    for z, *parts in zip((z1, z2), first, second, strict=True):
        torch.testing.assert_close(torch.cat(parts), z.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"same_class": 1.0}, "same_class is 1.0"),
        ({"hardness": -1.0}, "hardness is -1.0"),
        ({"hardness": 1.0, "decoupled": "weighted"}, "decoupled is weighted, but same_class and hardness"),
        ({"decoupled": "yes"}, "decoupled is 'yes', but it must be one of none, unweighted, weighted"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_simclr(**changes)
