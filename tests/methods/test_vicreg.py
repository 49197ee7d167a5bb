from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair, my_half
from sslcli.methods.vicreg import VICReg, vicreg_terms
from sslcli.nn.batch_norm import SyncBatchNorm
from tiny import TinyNet, make_batch


def tiny_vicreg(**changes: float) -> VICReg:
    return VICReg(TinyNet(), **({"dim": 6, "hidden": 10} | changes))  # type: ignore[arg-type]


def loss_of(
    z1: Tensor, z2: Tensor, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    terms = vicreg_terms(z1, z2)
    return invariance * terms.invariance + variance * terms.variance + covariance * terms.covariance


@golden_cases("vicreg_a")
def test_terms_equal_the_public_code(case: Case) -> None:
    z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
    terms = vicreg_terms(z1, z2)
    for name, value in terms._asdict().items():
        case.check(value, name)
    weights = {"invariance": case.params["lambda"], "variance": case.params["mu"], "covariance": case.params["nu"]}
    loss = loss_of(z1, z2, **weights)
    loss.backward()
    case.check(loss, "loss")
    case.check(z1.grad, "grad_z1")
    case.check(z2.grad, "grad_z2")


@golden_cases("vicreg_official")
def test_loss_and_gradients_equal_the_official_code(case: Case) -> None:
    z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
    weights = {"invariance": case.params["sim"], "variance": case.params["std"], "covariance": case.params["cov"]}
    loss = loss_of(z1, z2, **weights)
    loss.backward()
    case.check(loss, "loss")
    case.check(z1.grad, "grad_z1")
    case.check(z2.grad, "grad_z2")


def test_terms_equal_a_double_loop() -> None:
    views = torch.randn(2, 7, 5, dtype=torch.float64)
    variance, covariance = 0.0, 0.0
    for z in views:
        for i in range(5):
            variance += float(torch.relu(1 - (z[:, i].var() + 1e-4).sqrt())) / 5 / 2
            for j in range(5):
                if i != j:
                    products = (z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())
                    covariance += float(products.sum() / 6) ** 2 / 5
    terms = vicreg_terms(*views)
    assert float(terms.invariance) == pytest.approx(float((views[0] - views[1]).square().sum() / 35))
    assert float(terms.variance) == pytest.approx(variance)
    assert float(terms.covariance) == pytest.approx(covariance)


def test_equal_embeddings_cost_the_whole_variance_term() -> None:
    z = torch.full((8, 4), 3.0, dtype=torch.float64)
    terms = vicreg_terms(z, z)
    assert float(25 * terms.variance) == pytest.approx(24.75)
    assert float(terms.invariance) == float(terms.covariance) == 0.0
    assert float(loss_of(z, z)) == pytest.approx(24.75)


def test_independent_normal_dimensions_have_the_covariance_of_a_finite_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    count, dim = 64, 32
    found = [
        float(vicreg_terms(*torch.randn(2, count, dim, generator=generator, dtype=torch.float64)).covariance)
        for _ in range(200)
    ]
    assert sum(found) / len(found) == pytest.approx(2 * (dim - 1) / (count - 1), rel=0.02)


def test_half_precision_embeddings_are_compared_in_float32() -> None:
    z1, z2 = torch.randn(2, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        terms = vicreg_terms(z1, z2)
    torch.testing.assert_close(terms, vicreg_terms(z1, z2), rtol=0, atol=0)
    assert all(term.dtype == torch.float32 for term in vicreg_terms(z1.bfloat16(), z2.bfloat16()))


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
    torch.testing.assert_close((loss1 + loss2) / 2, whole.detach())
    for z, *parts in zip((z1, z2), first, second, strict=True):
        torch.testing.assert_close(torch.cat(parts), z.grad)


def test_expander_has_the_layers_of_the_official_code() -> None:
    layers = list(tiny_vicreg().expander)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in linear] == [
        (8, 10, True),
        (10, 10, True),
        (10, 6, False),
    ]
    assert [type(m) for m in layers[1:3]] == [SyncBatchNorm, nn.ReLU]
    assert type(layers[-1]) is nn.Linear


def test_loss_is_the_weighted_sum_of_the_terms_that_are_logged() -> None:
    found = tiny_vicreg(invariance=2.0, variance=3.0, covariance=5.0)(make_batch())
    expected = 2 * found["invariance"] + 3 * found["variance"] + 5 * found["covariance"]
    torch.testing.assert_close(found["loss"], expected)


@pytest.mark.parametrize("name", ["invariance", "variance", "covariance"])
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1.0"):
        tiny_vicreg(**{name: -1.0})
