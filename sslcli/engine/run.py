"""Objects and settings of a run, and its learning rate schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from sslcli.config.settings import TrainSettings
from sslcli.data.loader import Loader
from sslcli.engine import precision
from sslcli.engine.monitor import Monitor
from sslcli.engine.stop import StopRequest
from sslcli.methods.base import Method
from sslcli.nn import schedule
from sslcli.report.console import Screen


@dataclass
class Run:
    """All objects and settings of a run."""

    method: Method
    optimizer: Optimizer
    loader: Loader
    settings: TrainSettings
    peak_lr: float
    seed: int
    device: torch.device
    precision: str  # fp32, bf16 or fp16
    run_dir: Path
    config: dict[str, Any]  # plain values, saved in every checkpoint
    screen: Screen
    monitor: Monitor
    stop: StopRequest
    may_differ: tuple[str, ...] = ()  # keys whose values may differ from the configuration in the checkpoint
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = precision.grad_scaler(self.device, self.precision)

    @property
    def total_steps(self) -> int:
        return self.settings.max_steps or self.settings.epochs * self.loader.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Number of warmup steps: at most a quarter of the run, so that a short run reaches the peak learning rate."""
        return min(round(self.settings.warmup_epochs * self.loader.steps_per_epoch), self.total_steps // 4)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the 0-based `step`."""
        settings = self.settings
        length = {"total": self.total_steps, "warmup": self.warmup_steps}
        if settings.schedule == "cosine":
            return self.peak_lr * schedule.warmup_cosine(step, final=settings.final_lr, **length)
        milestones = settings.milestones if settings.schedule == "step" else ()
        return self.peak_lr * schedule.warmup_steps_down(step, milestones=milestones, **length)
