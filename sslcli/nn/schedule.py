"""Schedules of the learning rate, the weight decay, the momentum of momentum encoders and the teacher temperature.

They are functions without state. Their argument is the step, the epoch, or the progress (the fraction of the run that
is completed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def warmup_cosine(step: float, *, total: float, warmup: int = 0, final: float = 0.0, warmup_from: float = 0.0) -> float:
    """Return the fraction of the peak learning rate at 0-based `step` of `total` steps (SimCLR, BYOL, MoCo v3).

    During the first `warmup` steps, the fraction increases linearly from `warmup_from`, which is the value of the first
    step. Then the fraction decreases along half a cosine. It would reach `final` at step `total`, which is one step
    after the last step.
    """
    if step < warmup:
        return warmup_from + (1 - warmup_from) * (step / warmup)
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(angle))


def warmup_steps_down(
    step: int, *, total: float, warmup: int = 0, milestones: Sequence[float] = (), warmup_from: float = 0.0
) -> float:
    """Return the fraction of the peak learning rate at 0-based `step` of `total` steps.

    During the first `warmup` steps, the fraction increases linearly from `warmup_from` to 1. At each milestone, it is
    multiplied by 0.1. Milestones are given as fractions of `total`.
    """
    if step < warmup:
        return warmup_from + (1 - warmup_from) * (step / warmup)
    return float(0.1 ** sum(step >= at * total for at in milestones))


def ema_momentum(progress: float, *, base: float, final: float = 1.0) -> float:
    """Return the momentum of a target network, which is a moving average of the online network (BYOL app. A).

    The momentum increases along half a cosine from `base` to `final`. `progress` is the fraction of the run that is
    completed, in [0, 1].
    """
    return cosine(progress, start=base, end=final)


def cosine(progress: float, *, start: float, end: float) -> float:
    """Return a value that changes from `start` to `end` along half a cosine (weight decay in DINO and I-JEPA).

    `progress` is the fraction of the run that is completed, in [0, 1].
    """
    return end - (end - start) * 0.5 * (math.cos(math.pi * progress) + 1)


def linear(position: float, *, start: float, end: float, length: float) -> float:
    """Return a value that changes linearly from `start` to `end` and then stays (teacher temperature in DINO).

    `position` counts from 0, in the unit of `length`: steps, epochs or progress. The value is `end` from `length` on.
    """
    return start + (end - start) * (position / length) if position < length else end


def scale_lr(lr: float, *, batch_size: int, rule: str) -> float:
    """Return the learning rate for `batch_size` images per step. `lr` is the base learning rate at batch size 256.

    `rule` is one of:
        "linear": lr * batch_size / 256 (Goyal et al. 2017).
        "sqrt": lr * sqrt(batch_size / 256) (an alternative in SimCLR).
        "none": lr.
    """
    ratio = batch_size / 256
    return lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]
