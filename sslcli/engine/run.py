"""Objects and settings of a run, and its schedules."""

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
from sslcli.engine.phases import Phase, lr_factor, progress, warmup_steps
from sslcli.engine.stop import StopRequest
from sslcli.methods.base import Method
from sslcli.nn import schedule
from sslcli.nn.modes import update_statistics
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
    compiled: bool = False  # True if torch.compile compiles the steps
    may_differ: tuple[str, ...] = ()  # keys whose values may differ from the configuration in the checkpoint
    phases: tuple[Phase, ...] = ()  # one phase, unless the run was extended
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.phases = self.phases or (Phase(0, self.total_steps, self.settings.extend),)
        self.scaler = precision.grad_scaler(self.device, self.precision)

    @property
    def total_steps(self) -> int:
        return self.settings.max_steps or self.settings.epochs * self.loader.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Number of warmup steps of a run that has the current length from the start.

        If this run was extended, the number may differ from the number of warmup steps in its schedule.
        """
        return warmup_steps(self.total_steps, settings=self.settings, steps_per_epoch=self.loader.steps_per_epoch)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the 0-based `step`."""
        per_epoch = self.loader.steps_per_epoch
        return self.peak_lr * lr_factor(self.phases, step, settings=self.settings, steps_per_epoch=per_epoch)

    def weight_decay_at(self, step: int) -> float | None:
        """Return the weight decay of the 0-based `step`, or None if the weight decay is constant."""
        end = self.settings.final_weight_decay
        if end is None:
            return None
        return schedule.cosine(self.progress_at(step), start=self.optimizer.defaults["weight_decay"], end=end)

    def progress_at(self, step: int) -> float:
        """Return the progress of the run at the 0-based `step`, in [0, 1), for the method's schedules.

        It is divided by train.schedule_length. After an extension with train.extend=restart, the progress counts only
        the added steps.
        """
        return progress(self.phases, step) / self.settings.schedule_length

    @property
    def frozen_steps(self) -> int:
        """Number of steps at the start of the run in which the backbone is frozen (`train.freeze_backbone_epochs`)."""
        return self.frozen_steps_of(self.settings.freeze_backbone_epochs)

    def frozen_steps_of(self, frozen_epochs: float) -> int:
        """Return the number of steps at the start of the run in which a group with this `frozen_epochs` is frozen.

        It is at most a quarter of the run (before any extension), so that a short run trains the group.
        """
        return min(round(frozen_epochs * self.loader.steps_per_epoch), self.phases[0].total // 4)

    def begin_step(self, step: int) -> float:
        """Set the values of all schedules for the 0-based `step`, and return the learning rate.

        All values are pure functions of the step. Therefore, a resumed run has the same values.
        """
        lr, weight_decay = self.lr_at(step), self.weight_decay_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = (self.peak_lr if group.get("constant_lr") else lr) * group.get("lr_scale", 1.0)
            if weight_decay is not None and "wd_scale" in group:
                group["weight_decay"] = weight_decay * group["wd_scale"]
            if "frozen_epochs" in group:
                group["is_frozen"] = step < self.frozen_steps_of(group["frozen_epochs"])
        if self.settings.freeze_backbone_epochs:
            for part in (self.method.backbone, self.method.evaluated_network):
                update_statistics(part, enabled=step >= self.frozen_steps)
        self.method.before_step(self.progress_at(step), step / self.loader.steps_per_epoch)
        return lr
