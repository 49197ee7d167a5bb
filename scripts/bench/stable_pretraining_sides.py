"""Training steps of stable-pretraining for SimCLR, MoCo v2 and BYOL, run by a Lightning Trainer.

SimCLR and BYOL use the package's forward functions with its Module, as documented. MoCo v2 uses the package's method
class, since there is no forward function for MoCo v2. The network, the widths of the heads and the optimizer are the
same as for the other libraries. Callbacks that write, print or check are disabled. The remaining callbacks cannot be
disabled: they register the module for logging, update the momentum networks, and read the hardware counters every ten
seconds.

In addition to the steps of the other libraries, its steps compute the following:

- MoCo v2 passes the first view through the momentum network, to compute an embedding for probes.
- The buffers of BatchNorm are averaged in the momentum networks.
- The Trainer runs its loop and hooks, and metrics are logged although there is no logger.

The memory of its processes includes everything that the package imports, most of which a step does not need.

`best` adds the same settings as `lightly best`. The package's own `make_it_fast()` has no effect without a GPU.
"""

from __future__ import annotations

import logging
import time
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import lightning as pl
import stable_pretraining as spt
import torch
from measure import Result, is_long_enough, summary
from torch import nn
from workload import BATCH, CPU, cifar_resnet18, random_views

from sslcli.engine import precision as formats

WIDTH, TEMPERATURE = 512, 0.2
OFF = "progress_bar logging env_dump trainer_info module_summary slurm_info unused_params hf_checkpoint"
OFF += " sklearn_checkpoint wandb_checkpoint trackio_checkpoint swanlab_checkpoint"
OPTIM = {
    "optimizer": {"type": "SGD", "lr": 0.06, "momentum": 0.9, "weight_decay": 5e-4},
    "scheduler": {"type": "ConstantLR", "factor": 1.0},
}


class Views:
    """A data loader that repeats the same two views forever, in the batch format of stable-pretraining."""

    def __init__(self, *, channels_last: bool) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.views = [{"image": view.to(memory_format=layout)} for view in random_views()]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {"views": self.views}


class Clock(pl.Callback):
    """Callback that measures the time from the end of one step to the end of the next, and stops after `seconds`."""

    def __init__(self, seconds: float, warmup: int) -> None:
        self.seconds, self.warmup = seconds, warmup
        self.ends: list[float] = []

    @property
    def times(self) -> list[float]:
        """Seconds of each step after the warm-up."""
        return [end - begin for begin, end in pairwise(self.ends[self.warmup :])]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.ends.append(time.perf_counter())
        trainer.should_stop = is_long_enough(self.times, self.seconds)


def fit(method: str, *, best: bool, seconds: float = 12.0, warmup: int = 1) -> Result:
    """Fit a method for about `seconds` after `warmup` steps, and return the results as `measure.timed` does."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Without this, the package logs to standard output, which must contain only the results.
    spt.set(verbose="ERROR", default_callbacks=dict.fromkeys(OFF.split(), False))
    backbone = cifar_resnet18()
    if best:
        backbone.to(memory_format=torch.channels_last)
    clock = Clock(seconds, warmup)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if best and formats.resolve("auto", CPU) == "bf16" else "32-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([] if method == "simclr" else [spt.TeacherStudentCallback()]), clock],
    )
    trainer.fit(MODULES[method](backbone), Views(channels_last=best))
    return summary(clock.times, images=BATCH)


def simclr(backbone: nn.Module) -> pl.LightningModule:
    """Build SimCLR with a projection head of two layers."""
    from stable_pretraining.forward import simclr as forward

    return spt.Module(
        forward=forward,
        backbone=backbone,
        projector=spt.backbone.MLP(WIDTH, [WIDTH, 128], norm_layer="batch_norm"),
        simclr_loss=spt.losses.NTXEntLoss(temperature=TEMPERATURE),
        optim=OPTIM,
    )


def moco_v2(backbone: nn.Module) -> pl.LightningModule:
    """Build MoCo v2 with a queue of 4,096 keys."""
    method_class = spt.methods.MoCov2
    module = method_class(backbone, projector_dims=(WIDTH, 128), queue_length=4096, temperature=TEMPERATURE)

    def forward(self: nn.Module, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        output = method_class.forward(self, *(view["image"] for view in batch["views"]))
        return {"loss": output.loss, "embedding": output.embedding}

    module.forward = types.MethodType(forward, module)  # the forward of the class expects views, not a batch
    module.optim = OPTIM
    return module


def byol(backbone: nn.Module) -> pl.LightningModule:
    """Build BYOL with projection and prediction heads of 1,024 hidden units."""
    from stable_pretraining.forward import byol as forward

    return spt.Module(
        forward=forward,
        backbone=spt.TeacherStudentWrapper(backbone),
        projector=spt.TeacherStudentWrapper(spt.backbone.MLP(WIDTH, [1024, 256], norm_layer="batch_norm")),
        predictor=spt.backbone.MLP(256, [1024, 256], norm_layer="batch_norm"),
        byol_loss=spt.losses.BYOLLoss(),
        optim=OPTIM,
    )


MODULES: dict[str, Callable[[nn.Module], pl.LightningModule]] = {"simclr": simclr, "moco_v2": moco_v2, "byol": byol}
