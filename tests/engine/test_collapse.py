from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_cases import Case, golden_cases
from sslcli.engine.collapse import (
    CollapseDetector,
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


def healthy(d: int = 64) -> dict[str, float]:
    return {"std": 0.8 / math.sqrt(d), "uniformity": -2.1, "rankme": 40.0}


def collapsed(d: int = 64) -> dict[str, float]:
    return {"std": 0.03 / math.sqrt(d), "uniformity": -0.004, "rankme": 3.0}


def verdicts(series: list[dict[str, float]], *, dim: int = 64) -> list[bool]:
    detector = CollapseDetector()
    return [detector.update(values, dim=dim) is not None for values in series]


def test_a_fall_is_told_at_the_second_alarm_in_a_row():
    assert verdicts([healthy()] * 3 + [collapsed()] * 3) == [False] * 4 + [True] * 2


def test_a_dip_of_one_measurement_is_no_collapse():
    assert not any(verdicts([healthy(), healthy(), collapsed()] * 5))


def test_nothing_is_told_during_the_grace_period():
    assert verdicts([healthy()] + [collapsed()] * 3) == [False, False, False, True]


def test_a_net_that_starts_crowded_and_spreads_is_healthy():
    series = [
        {"std": s / 8, "uniformity": -4 * s * s, "rankme": 2 + 30 * s} for s in (0.01, 0.01, 0.02, 0.05, 0.1, 0.3)
    ]
    assert not any(verdicts(series))


def test_a_net_that_stays_a_point_is_told_once_patience_ends():
    point = {"std": 0.005 / 8, "uniformity": -0.0001, "rankme": 1.2}
    assert verdicts([point] * 12) == [False] * 10 + [True] * 2


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"std": 0.01}, "EMA momentum 0"),
        ({"uniformity": -0.3}, "temperature"),
        ({"rankme": 2.0}, "dimensional collapse"),
    ],
)
def test_each_measure_alarms_alone_with_causes_and_a_remedy(change, cause):
    detector = CollapseDetector()
    for _ in range(3):
        assert detector.update(healthy(), dim=64) is None
    assert detector.update(healthy() | change, dim=64) is None
    message = detector.update(healthy() | change, dim=64)
    assert message is not None
    assert cause in message


def test_ten_tight_classes_are_no_dimensional_collapse():
    assert not any(verdicts([healthy() | {"rankme": 150.0}] * 3 + [healthy() | {"rankme": 9.5}] * 5))


def test_values_that_are_not_finite_are_left_out():
    nan = dict.fromkeys(healthy(), math.nan)
    assert verdicts([healthy()] * 3 + [collapsed(), nan, collapsed()]) == [False] * 5 + [True]


def test_judge_goes_on_from_its_state_as_if_never_stopped():
    series = [healthy()] * 3 + [collapsed()] * 4
    want = verdicts(series)
    for cut in range(len(series)):
        detector, got = CollapseDetector(), []
        for i, values in enumerate(series):
            if i == cut:
                state = json.loads(json.dumps(detector.state_dict()))
                detector = CollapseDetector()
                detector.load_state_dict(state)
            got.append(detector.update(values, dim=64) is not None)
        assert got == want


def test_a_state_of_another_version_is_refused():
    with pytest.raises(ValueError, match="start a new run"):
        CollapseDetector().load_state_dict({"seen": 1.0})
    with pytest.raises(ValueError, match="grace=0"):
        CollapseDetector(grace=0)


def train_byol(*, predictor: bool, momentum: float) -> bool:
    """Train BYOL for 200 steps on noisy points in a plane; return True if collapse is reported at any measurement."""
    torch.manual_seed(0)

    def mlp(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))

    online, target, head = mlp(8), mlp(8), mlp(32) if predictor else nn.Identity()
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.SGD([*online.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    detector, has_collapsed = CollapseDetector(), False
    for step in range(201):
        image = torch.randn(128, 8)
        views = [image + 0.2 * torch.randn_like(image) for _ in range(2)]
        z = [online(view) for view in views]
        with torch.no_grad():
            y = [target(view) for view in views]
        if step % 50 == 0:
            has_collapsed = has_collapsed or detector.update(measure(z[0], z[1]), dim=32) is not None
        loss = -(F.cosine_similarity(head(z[0]), y[1]) + F.cosine_similarity(head(z[1]), y[0])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(online.parameters(), target.parameters(), strict=True):
                q.lerp_(p, 1 - momentum)
    return has_collapsed


def test_byol_without_predictor_and_momentum_is_told_within_200_steps():
    assert train_byol(predictor=False, momentum=0.0)


def test_byol_as_published_is_not_told():
    assert not train_byol(predictor=True, momentum=0.99)
