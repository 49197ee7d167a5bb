"""Schedules as pure functions of the step or of progress, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence


def warmup_cosine(step: int, *, total: int, warmup: int = 0, final: float = 0.0) -> float:
    """Share of the peak learning rate at the 0-based `step` of `total` (SimCLR, BYOL, MoCo v3).

    Rises linearly from 0 over `warmup` steps, so the first step moves nothing, then falls by half a cosine to
    `final`, which is reached at step `total`, one after the last.
    """
    if step < warmup:
        return step / warmup
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(angle))


def warmup_steps_down(step: int, *, total: int, warmup: int = 0, milestones: Sequence[float] = ()) -> float:
    """Share of the peak rate: linear warm-up, then a factor of 0.1 at each milestone, given as shares of the run."""
    if step < warmup:
        return step / warmup
    return float(0.1 ** sum(step >= at * total for at in milestones))


def ema_momentum(progress: float, *, base: float) -> float:
    """Momentum of a target network: `base` at progress 0, by half a cosine to 1 at progress 1 (BYOL app. A)."""
    return 1 - (1 - base) * 0.5 * (math.cos(math.pi * progress) + 1)


def scale_lr(lr: float, *, batch_size: int, rule: str) -> float:
    """The learning rate for `batch_size` images a step, given the one for 256.

    `rule` is linear (Goyal et al. 2017), sqrt (SimCLR's alternative, lr * sqrt(batch / 256)) or none.
    """
    share = batch_size / 256
    return lr * {"linear": share, "sqrt": math.sqrt(share), "none": 1.0}[rule]
