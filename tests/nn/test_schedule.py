from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from golden_cases import Case, golden_cases
from sslcli.nn.schedule import cosine, ema_momentum, linear, scale_lr, warmup_cosine, warmup_steps_down


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


@golden_cases("lr_official")
def test_learning_rate_equals_that_of_barlow_twins_vicreg_simsiam_and_mae(case: Case) -> None:
    params, per_epoch = case.params, case.params["iters_per_epoch"]
    total, scale = params["epochs"] * per_epoch, params["batch"] / 256
    steps = [int(step) for step in case.inputs["step"]]
    long = torch.tensor(
        [warmup_cosine(step, total=total, warmup=10 * per_epoch, final=0.001) for step in steps], dtype=case.dtype
    )
    for name, base in (("barlow_weights", "lr_weights"), ("barlow_biases", "lr_biases"), ("vicreg", "base_lr")):
        case.check(long * params[base] * scale, name)
    starts = [step - step % per_epoch for step in steps]  # the official code changes it once an epoch
    case.check(
        torch.tensor([warmup_cosine(step, total=total) for step in starts]).to(case.dtype)
        * (params["simsiam_lr"] * scale),
        "simsiam",
    )
    rates = [warmup_cosine(step, total=total, warmup=params["mae_warmup"] * per_epoch) for step in steps]
    case.check(torch.tensor(rates, dtype=case.dtype) * params["mae_blr"] * scale, "mae")


@golden_cases("dino_schedules")
def test_weight_decay_momentum_and_temperature_equal_those_of_dino(case: Case) -> None:
    params = case.params
    per_epoch = params["iters_per_epoch"]
    total, warmup = params["epochs"] * per_epoch, params["warmup_epochs"] * per_epoch
    shares = [int(step) / total for step in case.inputs["step"]]
    decay = {"start": params["weight_decay"], "end": params["weight_decay_end"]}
    case.check(torch.tensor([cosine(share, **decay) for share in shares], dtype=case.dtype), "weight_decay")
    momenta = [ema_momentum(share, base=params["momentum_teacher"]) for share in shares]
    case.check(torch.tensor(momenta, dtype=case.dtype), "momentum")
    case.check(torch.tensor(teacher_temperatures(case, 1, params["epochs"]), dtype=case.dtype), "teacher_temp")
    peak, final = params["lr"], params["min_lr"] / params["lr"]
    rates = torch.tensor([peak * warmup_cosine(step, total=total, warmup=warmup, final=final) for step in range(total)])
    torch.testing.assert_close(rates[warmup:].to(case.dtype), case.outputs["lr"][warmup:], rtol=2e-6, atol=1e-9)


@golden_cases("dinov2_schedules")
def test_weight_decay_momentum_and_temperature_equal_those_of_dinov2(case: Case) -> None:
    params, per_epoch = case.params, case.params["epoch_length"]
    total = params["epochs"] * per_epoch
    shares = [int(step) / total for step in case.inputs["step"]]
    decay = {"start": params["weight_decay"], "end": params["weight_decay_end"]}
    case.check(torch.tensor([cosine(share, **decay) for share in shares], dtype=case.dtype), "weight_decay")
    momenta = [ema_momentum(share, base=params["momentum"], final=params["momentum_final"]) for share in shares]
    case.check(torch.tensor(momenta, dtype=case.dtype), "momentum")
    case.check(torch.tensor(teacher_temperatures(case, per_epoch, total), dtype=case.dtype), "teacher_temp")


def teacher_temperatures(case: Case, per_epoch: int, count: int) -> list[float]:
    """Return `count` temperatures. The official warm-up includes its end, which is one position earlier than ours."""
    params = case.params
    length = params["warmup_teacher_temp_epochs"] * per_epoch - 1
    ends = {"start": params["warmup_teacher_temp"], "end": params["teacher_temp"]}
    return [linear(position, length=length, **ends) for position in range(count)]


@golden_cases("ijepa_schedules")
def test_schedules_longer_than_the_run_equal_those_of_ijepa(case: Case) -> None:
    """The official code raises the counter before it uses the learning rate and the weight decay, but not the EMA."""
    params = case.params
    steps = [int(step) for step in case.inputs["step"]]
    length = params["epochs"] * params["ipe"] * params["ipe_scale"]
    peak = params["lr"]
    shape = {"final": params["final_lr"] / peak, "warmup_from": params["start_lr"] / peak}
    warmup = params["warmup"] * params["ipe"]
    rates = [peak * warmup_cosine(step + 1, total=int(length), warmup=warmup, **shape) for step in steps]
    case.check(torch.tensor(rates, dtype=case.dtype), "lr")
    decays = [cosine((step + 1) / int(length), start=params["wd"], end=params["final_wd"]) for step in steps]
    case.check(torch.tensor(decays, dtype=case.dtype), "weight_decay")
    start, end = params["ema"]
    momenta = [linear(step, start=start, end=end, length=length) for step in steps]
    case.check(torch.tensor(momenta, dtype=case.dtype), "momentum")


@golden_cases("capi_schedule")
def test_the_cosine_that_is_cut_at_80_percent_equals_that_of_capi(case: Case) -> None:
    params = case.params
    warmup, total = params["warmup_iters"], params["total_iters"]
    length = warmup + (total - warmup) / params["truncate_cos"]
    steps = range(warmup, total)  # the official warm-up reaches the peak one step earlier
    rates = [params["base_value"] * warmup_cosine(step, total=length, warmup=warmup) for step in steps]
    expected = case.outputs["value"][warmup:total]
    torch.testing.assert_close(torch.tensor(rates).to(case.dtype), expected, rtol=2e-6, atol=1e-9)


@golden_cases("dinov3_schedule")
def test_learning_rate_equals_that_of_dinov3_which_reaches_its_final_value(case: Case) -> None:
    params = case.params
    shape = {"total": params["total"] - 1, "warmup": params["warmup"], "final": params["end"] / params["peak"]}
    rates = [params["peak"] * warmup_cosine(int(step), **shape) for step in case.inputs["step"]]
    case.check(torch.tensor(rates, dtype=case.dtype), "value")


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


def test_warmup_may_start_above_nothing() -> None:
    for schedule in (warmup_cosine, warmup_steps_down):
        rates = [schedule(step, total=20, warmup=4, warmup_from=0.2) for step in range(5)]
        assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_linear_value_stays_at_its_end() -> None:
    assert [linear(epoch, start=0.04, end=0.07, length=3) for epoch in range(5)] == pytest.approx(
        [0.04, 0.05, 0.06, 0.07, 0.07]
    )
    assert linear(0, start=0.04, end=0.07, length=0) == 0.07


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
