from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from golden_cases import Case, golden_cases
from sslcli.nn.schedule import ema_momentum, scale_lr, warmup_cosine, warmup_steps_down


@golden_cases("lr_cosine_warmup")
def test_learning_rate_equals_the_official_one_at_every_step(case: Case) -> None:
    params = case.params
    base, total = params["base_lr"], params["total"]
    factors = [
        warmup_cosine(int(step), total=total, warmup=params["warmup"], final=params["final"] / base)
        for step in case.inputs["step"]
    ]
    rates = torch.tensor(factors, dtype=case.dtype) * base
    case.check(rates, "lr")
    if "lr_byol" in case.outputs:  # BYOL's ends at 0
        case.check(rates, "lr_byol")


@golden_cases("byol_tau")
def test_target_momentum_equals_that_of_byol(case: Case) -> None:
    params = case.params
    found = [ema_momentum(int(step) / params["max_steps"], base=params["base"]) for step in case.inputs["step"]]
    case.check(torch.tensor(found, dtype=case.dtype), "tau")


@golden_cases("mocov3_momentum")
def test_target_momentum_equals_that_of_moco_v3(case: Case) -> None:
    params = case.params
    found = [ema_momentum(float(epoch) / params["epochs"], base=params["base"]) for epoch in case.inputs["epoch"]]
    case.check(torch.tensor(found, dtype=case.dtype), "m")


def test_warmup_starts_at_nothing_and_reaches_the_peak_at_its_end() -> None:
    factors = [warmup_cosine(step, total=20, warmup=5) for step in range(20)]
    assert factors[:6] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.02


def test_without_warmup_the_first_step_has_the_peak_rate() -> None:
    assert warmup_cosine(0, total=10) == 1.0


def test_cosine_ends_at_the_final_share_one_step_after_the_last() -> None:
    assert warmup_cosine(30, total=30, warmup=3, final=0.1) == pytest.approx(0.1)
    assert warmup_cosine(15, total=30, final=0.1) == pytest.approx(0.55)


def test_a_run_that_is_all_warmup_still_has_a_rate() -> None:
    assert [warmup_cosine(step, total=4, warmup=4) for step in range(5)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_steps_fall_by_ten_at_every_milestone() -> None:
    factors = [warmup_steps_down(step, total=10, milestones=[0.6, 0.8]) for step in range(10)]
    assert factors == pytest.approx([1.0] * 6 + [0.1] * 2 + [0.01] * 2)


def test_steps_without_milestones_stay_after_their_warmup() -> None:
    assert [warmup_steps_down(step, total=5, warmup=2) for step in range(5)] == pytest.approx([0, 0.5, 1, 1, 1])


def test_momentum_rises_from_its_base_to_one() -> None:
    momenta = [ema_momentum(t / 50, base=0.97) for t in range(51)]
    assert momenta[0] == pytest.approx(0.97)
    assert momenta[50] == 1.0
    assert all(earlier < later for earlier, later in pairwise(momenta))
    assert ema_momentum(0.5, base=0.99, final=0.999) == pytest.approx(0.9945)  # solo-learn: MomentumUpdater
    assert ema_momentum(1.0, base=0.99, final=0.999) == 0.999


def test_learning_rate_scales_by_the_rule() -> None:
    assert scale_lr(0.3, batch_size=4096, rule="linear") == pytest.approx(4.8)
    assert scale_lr(1.2, batch_size=4096, rule="sqrt") == pytest.approx(4.8)  # SimCLR: 0.075 sqrt(batch)
    assert scale_lr(0.3, batch_size=4096, rule="none") == 0.3
    assert {scale_lr(0.3, batch_size=256, rule=rule) for rule in ("linear", "sqrt", "none")} == {0.3}
