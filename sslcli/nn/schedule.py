"""Schedules of the learning rate and of the momentum of momentum encoders.

They are functions without state. Their argument is the step, or the progress (the fraction of the run that is
completed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def warmup_cosine(step: int, *, total: int, warmup: int = 0, final: float = 0.0) -> float:
    """Return the fraction of the peak learning rate at 0-based `step` of `total` steps (SimCLR, BYOL, MoCo v3).

    During the first `warmup` steps, the fraction increases linearly from 0; the first step has learning rate 0. Then
    the fraction decreases along half a cosine. It would reach `final` at step `total`, which is one step
    after the last step.
    """
    if step < warmup:
        return step / warmup
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(angle))


def warmup_steps_down(step: int, *, total: int, warmup: int = 0, milestones: Sequence[float] = ()) -> float:
    """Return the fraction of the peak learning rate at 0-based `step` of `total` steps.

    During the first `warmup` steps, the fraction increases linearly from 0 to 1. At each milestone, it is multiplied by
    0.1. Milestones are given as fractions of `total`.
    """
    if step < warmup:
        return step / warmup
    return float(0.1 ** sum(step >= at * total for at in milestones))


def ema_momentum(progress: float, *, base: float, final: float = 1.0) -> float:
    """Return the momentum of a target network, which is a moving average of the online network (BYOL app. A).

    The momentum increases along half a cosine from `base` to `final`. `progress` is the fraction of the run that is
    completed, in [0, 1].
    """
    return final - (final - base) * 0.5 * (math.cos(math.pi * progress) + 1)


def scale_lr(lr: float, *, batch_size: int, rule: str) -> float:
    """Return the learning rate for `batch_size` images per step. `lr` is the base learning rate at batch size 256.

    `rule` is one of:
        "linear": lr * batch_size / 256 (Goyal et al. 2017).
        "sqrt": lr * sqrt(batch_size / 256) (an alternative in SimCLR).
        "none": lr.
    """
    ratio = batch_size / 256
    return lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]
