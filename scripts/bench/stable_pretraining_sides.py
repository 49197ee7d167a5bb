"""stable-pretraining's steps of SimCLR, MoCo v2 and BYOL: its Module fitted by a Lightning Trainer, as documented.

SimCLR and BYOL are its forward functions on its Module, MoCo v2 is its method class, for want of such a function. The
network, the widths of the heads and the optimizer are those of the other sides. Callbacks that write, print or check
are off. On are those that register the module for logging, move the momentum networks, and read the hardware's counters
every ten seconds, which has no switch.

What its steps do beyond the others':

- MoCo v2 passes the first view through the momentum network as well, for an embedding that probes would read.
- The momentum networks average the buffers of BatchNorm too.
- The Trainer's loop and hooks, and values that are logged to no logger.
- Its processes hold what the package imports, most of which a step does not need.

`best` adds what `lightly best` has. The package's own `make_it_fast()` changes nothing without a GPU.
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
from measure import Result, enough, summary
from torch import nn
from training import BATCH, CPU, cifar_resnet18, images

from sslcli.engine import precision as formats

WIDTH, TEMPERATURE = 512, 0.2
OFF = "progress_bar logging env_dump trainer_info module_summary slurm_info unused_params hf_checkpoint"
OFF += " sklearn_checkpoint wandb_checkpoint trackio_checkpoint swanlab_checkpoint"
OPTIM = {
    "optimizer": {"type": "SGD", "lr": 0.06, "momentum": 0.9, "weight_decay": 5e-4},
    "scheduler": {"type": "ConstantLR", "factor": 1.0},
}


class Views:
    """A loader of the same two views again and again, in the form of the package's batches."""

    def __init__(self, *, channels_last: bool) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.views = [{"image": view.to(memory_format=layout)} for view in images()]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {"views": self.views}


class Clock(pl.Callback):
    """Times from the end of a step to the end of the next, and stops the fit when there are enough of them."""

    def __init__(self, seconds: float, warmup: int) -> None:
        self.seconds, self.warmup = seconds, warmup
        self.ends: list[float] = []

    @property
    def times(self) -> list[float]:
        return [end - begin for begin, end in pairwise(self.ends[self.warmup :])]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.ends.append(time.perf_counter())
        trainer.should_stop = enough(self.times, self.seconds)


def fitted(method: str, *, best: bool, seconds: float = 12.0, warmup: int = 1) -> Result:
    """Steps of a fit, timed as `measure.timed` does it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # It would log on standard output, where the figures are.
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
    from stable_pretraining.forward import simclr as forward

    return spt.Module(
        forward=forward,
        backbone=backbone,
        projector=spt.backbone.MLP(WIDTH, [WIDTH, 128], norm_layer="batch_norm"),
        simclr_loss=spt.losses.NTXEntLoss(temperature=TEMPERATURE),
        optim=OPTIM,
    )


def moco_v2(backbone: nn.Module) -> pl.LightningModule:
    kind = spt.methods.MoCov2
    module = kind(backbone, projector_dims=(WIDTH, 128), queue_length=4096, temperature=TEMPERATURE)

    def of_batch(self: nn.Module, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        found = kind.forward(self, *(view["image"] for view in batch["views"]))
        return {"loss": found.loss, "embedding": found.embedding}

    module.forward = types.MethodType(of_batch, module)  # the class leaves it to its user to take a batch apart
    module.optim = OPTIM
    return module


def byol(backbone: nn.Module) -> pl.LightningModule:
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
