from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from golden_cases import Case, golden_cases
from sslcli.engine.health import (
    alignment,
    effective_rank,
    feature_std,
    mean_norm,
    measure,
    rankme,
    uniformity,
)


@golden_cases("align_uniform")
def test_alignment_and_uniformity_equal_the_published_values_and_gradients(case: Case) -> None:
    z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
    align = alignment(z1, z2, alpha=case.params["alpha"])
    uniform = [uniformity(z, t=case.params["t"], chunk=3) for z in (z1, z2)]
    loss = align + sum(uniform) / 2
    loss.backward()
    case.check(align, "alignment")
    case.check(uniform[0], "uniformity_z1")
    case.check(uniform[1], "uniformity_z2")
    case.check(loss, "loss")
    case.check(z1.grad, "grad_z1")
    case.check(z2.grad, "grad_z2")


@golden_cases("rankme_std")
def test_rank_and_std_equal_the_published_values(case: Case) -> None:
    z = case.inputs["features"]
    case.check(rankme(z), "rankme")
    case.check(rankme(z, eps=1e-5), "rankme_eps_1e-5")
    case.check(effective_rank(z), "effective_rank_centered")
    case.check(feature_std(z), "std_l2_normalized")
    case.check(feature_std(z, biased=True), "std_l2_normalized_biased")


def test_uniformity_does_not_depend_on_the_chunk_and_equals_a_loop():
    z = torch.randn(37, 5, dtype=torch.float64)
    x = F.normalize(z, dim=1)
    pairs = [torch.exp(-2 * (x[i] - x[j]).square().sum()) for i in range(37) for j in range(i + 1, 37)]
    for chunk in (1, 7, 36, 37, 1000):
        torch.testing.assert_close(uniformity(z, chunk=chunk), torch.stack(pairs).mean().log())


def test_uniform_sphere_has_its_closed_form_values():
    z = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    assert float(uniformity(z)) == pytest.approx(-3.9375, abs=2e-3)
    assert float(feature_std(z)) == pytest.approx(1 / math.sqrt(128), rel=1e-2)
    assert float(mean_norm(z)) < 0.03
    assert float(rankme(z)) > 120


def test_a_single_point_has_std_and_uniformity_0_mean_norm_and_rank_1():
    z = torch.ones(64, 16) * 3
    values = measure(z, z)
    expected = {"std": 0, "mean_norm": 1, "uniformity": 0, "rankme": 1, "effective_rank": 1, "alignment": 0}
    assert values == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_singular_values_give_their_number_as_rank(rank):
    q = torch.linalg.qr(torch.randn(50, rank, dtype=torch.float64))[0]
    p = torch.linalg.qr(torch.randn(20, rank, dtype=torch.float64))[0]
    assert float(rankme(q @ p.T)) == pytest.approx(rank, rel=1e-4)


def test_centered_rank_does_not_count_a_common_mean():
    z = torch.randn(200, 10, dtype=torch.float64)
    assert float(effective_rank(z + 100)) == pytest.approx(float(effective_rank(z)), rel=1e-6)
    assert float(rankme(z + 100)) < 0.5 * float(rankme(z))


def test_rankme_is_finite_for_all_zero_features():
    assert float(rankme(torch.zeros(10, 4))) == pytest.approx(1, abs=1e-3)


def test_measure_of_features_that_are_not_finite_is_nan():
    z = torch.randn(8, 4)
    z[2, 1] = math.inf
    assert all(math.isnan(v) for v in measure(z, z).values())


@pytest.mark.parametrize("z", [torch.randn(4), torch.randn(1, 4), torch.ones(4, 4, dtype=torch.int64)])
def test_wrong_feature_matrices_are_refused(z):
    for function in (feature_std, mean_norm, uniformity, rankme, effective_rank):
        with pytest.raises(ValueError, match="one row per image"):
            function(z)


def test_pairs_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        alignment(torch.randn(4, 3), torch.randn(5, 3))
