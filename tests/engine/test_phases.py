"""Phases of an extended run, and the schedule of each phase."""

from __future__ import annotations

import pytest

from sslcli.config.settings import TrainSettings
from sslcli.engine.phases import Phase, lr_factor, phase_of, plan, progress
from sslcli.errors import ConfigError
from sslcli.nn.schedule import warmup_cosine

FIRST = Phase(0, 20, "rescale")


def settings(**changes: object) -> TrainSettings:
    values = dict.fromkeys(TrainSettings.__dataclass_fields__)
    values |= {"epochs": 2, "batch_size": 8, "accumulate": 1, "log_every_steps": 1, "keep": 1, "save_every_epochs": 1}
    values |= {"precision": "fp32", "sharding": "none", "lr_scaling": "none", "schedule": "cosine", "warmup_epochs": 0}
    values |= {"final_lr": 0.0, "milestones": [0.5], "compile": False, "cached_gradients": False, "extend": "rescale"}
    values |= {"warmup_from": 0.0, "schedule_length": 1.0, "clip_grad_by": "all"}
    return TrainSettings(**(values | changes))  # type: ignore[arg-type]


def factor(phases: tuple[Phase, ...], step: int, **changes: object) -> float:
    return lr_factor(phases, step, settings=settings(**changes), steps_per_epoch=10)


def test_a_longer_run_adds_a_phase_and_the_same_length_adds_none() -> None:
    assert plan((), step=0, total=20, extend="rescale") == (FIRST,)
    assert plan((FIRST,), step=20, total=20, extend="restart") == (FIRST,)  # `extend` has no effect yet
    longer = plan((FIRST,), step=20, total=30, extend="decay")
    assert longer == (FIRST, Phase(20, 30, "decay"))
    assert plan(longer, step=25, total=30, extend="decay") == longer
    assert plan(longer, step=12, total=30, extend="decay") == longer  # an older checkpoint after damage of the newest
    assert plan(longer, step=30, total=40, extend="restart") == (*longer, Phase(30, 40, "restart"))
    assert plan((FIRST,), step=0, total=30, extend="restart") == (Phase(0, 30, "restart"),)  # nothing was trained yet


def test_an_extension_without_a_checkpoint_may_be_changed_or_withdrawn() -> None:
    longer = plan((FIRST,), step=20, total=3000, extend="decay")
    assert plan(longer, step=20, total=30, extend="restart") == (FIRST, Phase(20, 30, "restart"))
    assert plan(longer, step=20, total=3000, extend="restart") == (FIRST, Phase(20, 3000, "restart"))
    assert plan(longer, step=20, total=20, extend="rescale") == (FIRST,)


def test_a_run_is_not_shortened_and_its_extension_keeps_its_kind() -> None:
    longer = (FIRST, Phase(20, 30, "restart"))
    with pytest.raises(ConfigError, match="give 25 steps, but the run has a length of 30 steps and has trained 24"):
        plan(longer, step=24, total=25, extend="restart")
    with pytest.raises(ConfigError, match=r"extended to 30 steps with train.extend=restart.*set train.extend=restart"):
        plan(longer, step=24, total=30, extend="rescale")


def test_a_step_belongs_to_the_phase_in_which_it_was_trained() -> None:
    phases = (FIRST, Phase(8, 30, "rescale"), Phase(30, 40, "restart"))
    assert [phase_of(phases, step) for step in (0, 7, 8, 29, 30, 39)] == [0, 0, 1, 1, 2, 2]
    assert [progress(phases, step) for step in (7, 8, 29, 30, 35)] == [7 / 20, 8 / 30, 29 / 30, 0, 0.5]


def test_steps_before_an_extension_keep_their_learning_rate() -> None:
    for extend in ("rescale", "constant", "decay", "restart"):
        phases = (FIRST, Phase(8, 30, extend))
        assert [factor(phases, step) for step in range(8)] == [warmup_cosine(step, total=20) for step in range(8)]


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_rescale_is_the_schedule_of_the_new_length_and_restart_that_of_the_added_steps(schedule: str) -> None:
    given = {"schedule": schedule, "warmup_epochs": 0.3}
    for start in (8, 20):
        rescaled, restarted = ((FIRST, Phase(start, 60, extend)) for extend in ("rescale", "restart"))
        whole, added = ((Phase(0, total, "rescale"),) for total in (60, 60 - start))
        for step in range(start, 60):
            assert factor(rescaled, step, **given) == factor(whole, step, **given)
            assert factor(restarted, step, **given) == factor(added, step - start, **given)


def test_a_schedule_longer_than_the_run_ends_early() -> None:
    for step in range(20):
        longer = warmup_cosine(step, total=25, warmup=5, warmup_from=0.1)
        assert factor((FIRST,), step, schedule_length=1.25, warmup_epochs=0.5, warmup_from=0.1) == longer


def test_constant_keeps_the_last_learning_rate_and_decay_lets_it_fall_to_the_final_one() -> None:
    last = factor((FIRST,), 9)
    assert [factor((FIRST, Phase(10, 30, "constant")), step) for step in (10, 20, 29)] == [last] * 3
    decay = (FIRST, Phase(10, 30, "decay"))
    rates = [factor(decay, step, final_lr=0.1) for step in range(10, 30)]
    assert rates[0] == pytest.approx(factor((FIRST,), 9, final_lr=0.1))
    assert rates == sorted(rates, reverse=True)
    assert 0.1 < rates[-1] < 0.12
    flat = (Phase(0, 20, "rescale"), Phase(20, 30, "decay"))  # warmup-stable-decay
    assert factor(flat, 20, schedule="constant") == 1
    assert factor(flat, 25, schedule="constant") == pytest.approx(0.5)


def test_extensions_follow_one_another() -> None:
    phases = (FIRST, Phase(10, 30, "constant"), Phase(30, 40, "decay"))
    assert factor(phases, 30) == factor((FIRST,), 9)
    assert factor(phases, 35) == pytest.approx(factor((FIRST,), 9) / 2)
