"""Phases of a run whose length was changed, and the learning rate schedule of each phase.

A phase is a part of a run during which the length that the command sets did not change. A run that was never extended
has one phase. Each extension adds a phase. The learning rate of a step is a pure function of the step and the phases,
so the phases are the only state of a schedule. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sslcli.config.checks import check_choice
from sslcli.config.settings import EXTENSIONS, TrainSettings
from sslcli.errors import ConfigError
from sslcli.nn import schedule
from sslcli.system.stored import mismatch

LENGTH_KEYS = ("train.epochs", "train.max_steps", "train.extend")  # may change between two starts of a run, see `plan`


@dataclass(frozen=True)
class Phase:
    """Part of a run during which the requested length of the run did not change.

    Attributes:
        start: first 0-based step of the phase.
        total: length of the whole run in steps, from step 0, as it was set during the phase.
        extend: the value of `train.extend` that defines the schedule of the phase. It has no effect in the first phase.
    """

    start: int
    total: int
    extend: str


def phases_from(rows: Any) -> tuple[Phase, ...]:
    """Return the phases in the list `rows`. Each row defines one phase: it maps the fields of `Phase` to values.

    Raises ValueError if the list is invalid.
    """
    wrong = mismatch(rows, list[Phase])
    if wrong:
        raise ValueError(wrong)
    try:
        phases = tuple(Phase(**row) for row in rows)
    except TypeError as error:
        raise ValueError(str(error)) from error
    starts = [phase.start for phase in phases]
    if starts[:1] != [0] or starts != sorted(set(starts)) or any(phase.start >= phase.total for phase in phases):
        raise ValueError("steps are not in order")
    for phase in phases:
        check_choice("extend", phase.extend, EXTENSIONS)
    return phases


def plan(history: Sequence[Phase], *, step: int, total: int, extend: str) -> tuple[Phase, ...]:
    """Return the phases of a run of `total` steps that continues after `step` steps.

    First, phases that start at `step` or later are discarded, because no checkpoint contains any of their steps. Then,
    if `total` is greater than the length of the run that the last remaining phase contains (`Phase.total`), a new phase
    that starts at `step` is added.

    Args:
        history: the phases so far; empty for a new run.
        step: number of steps in the newest checkpoint.
        total: the new length of the run in steps.
        extend: value of `train.extend`.

    Raises ConfigError if the run would become shorter, or if the run was already extended to `total` steps with another
    value of `train.extend`.
    """
    if not history or (step == 0 and history[-1].total != total):
        return (Phase(0, total, extend),)
    begun = tuple(phase for phase in history if phase.start < step) or (history[0],)
    last = history[-1]
    if last.total == total and (len(history) == 1 or last.extend == extend):
        return tuple(history)
    if last.total == total and last == begun[-1]:
        raise ConfigError(
            f"train.extend is {extend!r}, but the run was extended to {total} steps with train.extend={last.extend}, "
            f"and has trained {step} of them: set train.extend={last.extend} to resume"
        )
    if total < begun[-1].total:
        raise ConfigError(
            f"train.epochs and train.max_steps give {total} steps, but the run has a length of {begun[-1].total} "
            f"steps and has trained {step} of them: a run cannot be shortened. Set its length to resume, or another "
            "run_dir to start a new run"
        )
    return begun if total == begun[-1].total else (*begun, Phase(step, total, extend))


def phase_of(phases: Sequence[Phase], step: int) -> int:
    """Return the index of the phase that contains the 0-based `step`."""
    return max(number for number, phase in enumerate(phases) if number == 0 or phase.start <= step)


def progress(phases: Sequence[Phase], step: int) -> float:
    """Return the progress of the run at the 0-based `step`, in [0, 1). EMA momentum and similar values depend on it.

    The progress is `step` divided by the length of the run. After an extension with train.extend=restart, the progress
    counts only the added steps.
    """
    phase = phases[phase_of(phases, step)]
    first = phase.start if phase.extend == "restart" else 0
    return (step - first) / (phase.total - first)


def lr_factor(phases: Sequence[Phase], step: int, *, settings: TrainSettings, steps_per_epoch: int) -> float:
    """Return the learning rate of the 0-based `step` as a fraction of the peak learning rate.

    `phases` are all phases of the run. A run has one phase, and each extension of the run adds a phase.
    """
    number = phase_of(phases, step)
    phase = phases[number]
    if number == 0 or phase.extend == "rescale":
        return scheduled_factor(step, total=phase.total, settings=settings, steps_per_epoch=steps_per_epoch)
    added = {"step": step - phase.start, "total": phase.total - phase.start}
    if phase.extend == "restart":
        return scheduled_factor(**added, settings=settings, steps_per_epoch=steps_per_epoch)
    last = lr_factor(phases[:number], phase.start - 1, settings=settings, steps_per_epoch=steps_per_epoch)
    if phase.extend == "constant" or last == 0:
        return last
    return last * schedule.warmup_cosine(**added, final=min(1.0, settings.final_lr / last))


def scheduled_factor(step: int, *, total: int, settings: TrainSettings, steps_per_epoch: int) -> float:
    """Return the learning rate that `train.schedule` gives at the 0-based `step` of `total`, as a fraction of the peak.

    `total` is the length of the schedule in steps. For a run that was extended to more steps, use `lr_factor` instead.
    """
    length: dict[str, Any] = {
        "total": total,
        "warmup": warmup_steps(total, settings=settings, steps_per_epoch=steps_per_epoch),
    }
    if settings.schedule == "cosine":
        length["total"] *= settings.schedule_length
        return schedule.warmup_cosine(step, final=settings.final_lr, warmup_from=settings.warmup_from, **length)
    milestones = settings.milestones if settings.schedule == "step" else ()
    return schedule.warmup_steps_down(step, milestones=milestones, warmup_from=settings.warmup_from, **length)


def warmup_steps(total: int, *, settings: TrainSettings, steps_per_epoch: int) -> int:
    """Return the number of warmup steps: `train.warmup_epochs` in steps, but at most a quarter of `total`.

    With this limit, a short run also reaches the peak learning rate.
    """
    return min(round(settings.warmup_epochs * steps_per_epoch), total // 4)
