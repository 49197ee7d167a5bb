from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair, my_half
from sslcli.engine.optim import parameter_groups
from sslcli.methods.barlow_twins import BarlowTwins, correlation_terms, standardized
from sslcli.nn.batch_norm import SyncBatchNorm
from tiny import TinyNet, make_batch


def tiny_barlow_twins(**changes: float) -> BarlowTwins:
    return BarlowTwins(TinyNet(), **({"dim": 6, "hidden": 10} | changes))  # type: ignore[arg-type]


def loss_of(z1: Tensor, z2: Tensor, *, redundancy: float = 0.0051) -> Tensor:
    on_diagonal, off_diagonal = correlation_terms(z1, z2)
    return on_diagonal + redundancy * off_diagonal


@golden_cases("barlow_a")
def test_loss_and_gradients_equal_public_code(case: Case) -> None:
    z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
    loss = loss_of(z1, z2, redundancy=case.params["lambda"])
    loss.backward()
    case.check(loss, "loss")
    case.check(0.025 * loss, "loss_sololearn_scaled")
    case.check(standardized(z1).T @ standardized(z2) / len(z1), "cross_correlation")
    case.check(z1.grad, "grad_z1")
    case.check(z2.grad, "grad_z2")


@golden_cases("barlow_official")
def test_loss_and_gradients_equal_the_official_code(case: Case) -> None:
    z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
    loss = loss_of(z1, z2, redundancy=case.params["lambda"])
    loss.backward()
    case.check(loss, "loss")
    case.check(z1.grad, "grad_z1")
    case.check(z2.grad, "grad_z2")


def test_equal_whitened_views_have_no_loss() -> None:
    z, _ = torch.linalg.qr(torch.randn(32, 8, dtype=torch.float64) - 0.5)
    z = torch.linalg.qr(z - z.mean(0))[0] * 32**0.5 * 1e3  # so large that the epsilon of the variance is negligible
    z = z - z.mean(0)
    assert float(loss_of(z, z)) < 1e-6 * 8


def test_affine_changes_of_a_dimension_do_not_matter() -> None:
    z1, z2 = 100 * torch.randn(2, 12, 5, dtype=torch.float64)
    scale, shift = torch.rand(5, dtype=torch.float64) + 1, torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(loss_of(z1 * scale + shift, z2), loss_of(z1, z2), rtol=1e-5, atol=1e-5)


def test_independent_views_have_the_loss_of_random_correlations() -> None:
    generator = torch.Generator().manual_seed(0)
    count, dim, redundancy = 64, 32, 0.05
    found = [
        float(loss_of(*torch.randn(2, count, dim, generator=generator, dtype=torch.float64), redundancy=redundancy))
        for _ in range(200)
    ]
    expected = dim * (1 + 1 / count) + redundancy * dim * (dim - 1) / count
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.02)


def test_collapsed_embeddings_cost_one_per_dimension() -> None:
    z = torch.full((8, 4), 3.0, dtype=torch.float64)
    assert float(loss_of(z, z)) == pytest.approx(4.0)


def test_half_precision_embeddings_are_compared_in_float32() -> None:
    z1, z2 = torch.randn(2, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        terms = correlation_terms(z1, z2)
    torch.testing.assert_close(terms, correlation_terms(z1, z2), rtol=0, atol=0)


def loss_of_my_half(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = my_half(z1).requires_grad_(), my_half(z2).requires_grad_()
    loss = loss_of(a, b)
    loss.backward()
    assert a.grad is not None
    assert b.grad is not None
    return loss.detach(), a.grad / 2, b.grad / 2  # processes average their gradients


def test_two_processes_compute_the_loss_and_gradient_of_the_whole_batch(pair: Pair) -> None:
    z1, z2 = torch.randn(2, 10, 4, dtype=torch.float64)
    (loss1, *first), (loss2, *second) = pair.run(loss_of_my_half, z1, z2)
    z1.requires_grad_()
    z2.requires_grad_()
    whole = loss_of(z1, z2)
    whole.backward()
    torch.testing.assert_close(loss1, whole.detach())
    torch.testing.assert_close(loss2, whole.detach())
    for z, *parts in zip((z1, z2), first, second, strict=True):
        torch.testing.assert_close(torch.cat(parts), z.grad)


def test_projector_has_the_layers_of_the_official_code() -> None:
    layers = list(tiny_barlow_twins().projector)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(8, 10), (10, 10), (10, 6)]
    assert all(m.bias is None for m in linear)
    assert [type(m) for m in layers[1:3]] == [SyncBatchNorm, nn.ReLU]
    assert type(layers[-1]) is nn.Linear


def test_loss_is_the_scaled_sum_of_the_terms_that_are_logged() -> None:
    found = tiny_barlow_twins(redundancy=0.5, loss_scale=0.1)(make_batch())
    torch.testing.assert_close(found["loss"], 0.1 * (found["on_diagonal"] + 0.5 * found["off_diagonal"]))


def test_biases_and_batchnorm_parameters_may_have_their_own_rate() -> None:
    method = tiny_barlow_twins(plain_lr_scale=0.25)
    groups = parameter_groups(method, weight_decay=0.1)
    scales = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert len(scales) == len(list(method.parameters()))
    assert all(scales[id(p)] == (0.25 if p.ndim <= 1 else 1.0) for p in method.parameters())
    assert tiny_barlow_twins().group_options() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"redundancy": 0.0}, "redundancy is 0.0"),
        ({"loss_scale": -1.0}, "loss_scale is"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_barlow_twins(**changes)
