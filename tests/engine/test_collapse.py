from __future__ import annotations

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslcli.engine.collapse import CollapseDetector
from sslcli.engine.health import (
    measure,
)


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
        ({"std": 0.01}, "no stop-gradient .*, too high a learning rate, .* temperature or no centering"),
        ({"uniformity": -0.3}, "no stop-gradient .*, too high a learning rate, too high a temperature or no centering"),
        ({"rankme": 2.0}, r"dimensional collapse\)"),
    ],
)
def test_each_measure_alarms_alone_with_causes_and_a_remedy(change, cause):
    detector = CollapseDetector()
    for _ in range(3):
        assert detector.update(healthy(), dim=64) is None
    assert detector.update(healthy() | change, dim=64) is None
    message = detector.update(healthy() | change, dim=64)
    assert message is not None
    assert re.search(rf"[\w*]+ is \S+, (below|above) .*, so .*{cause}.*optimizer.lr", message)
    assert len(message) < 550


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


def informed(information: float) -> dict[str, float]:
    return healthy() | {"assignment_information": information}


def test_assignments_that_lose_their_information_are_told_though_the_embeddings_differ():
    assert verdicts([informed(0.9)] * 3 + [informed(0.001)] * 3) == [False] * 4 + [True] * 2
    detector = CollapseDetector()
    messages = [detector.update(informed(value), dim=64) for value in (0.9, 0.9, 0.9, 0.004, 0.004)]
    assert re.search(
        r"assignment_information is 0.004 nats \(its maximum was 0.9\), so nearly all .*no centering", messages[-1]
    )
    assert len(messages[-1]) < 600


def test_assignments_with_little_information_are_healthy_unless_they_never_get_any():
    assert not any(verdicts([informed(value) for value in (0.001, 0.001, 0.003, 0.009, 0.008, 0.004, 0.2)]))
    assert not any(verdicts([informed(value) for value in (0.36, 0.25, 0.16, 0.07, 0.055)]))
    assert verdicts([informed(0.0015)] * 42).index(True) == 40


def test_a_state_without_assignments_is_that_of_an_older_version():
    detector = CollapseDetector()
    old = {name: value for name, value in detector.state_dict().items() if name not in ("uninformed", "information")}
    detector.load_state_dict(old | {"seen": 7.0})
    assert detector.state_dict() == CollapseDetector().state_dict() | {"seen": 7.0}
