"""Benchmark of one training step on synthetic images: ResNet-18 with the CIFAR stem, 32 px, 128 images, two views.

lightly's steps are those of its documented examples: plain loops with its heads and losses. `best` adds what a user can
enable: bfloat16 if the processor supports it natively, channels-last memory, an allocator that keeps freed memory. The
steps of stable-pretraining are in `stable_pretraining_sides.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from measure import Result, run_benchmark, timed
from torch import Tensor, nn
from workload import BATCH, CPU, METHODS, SIZE, cifar_resnet18, random_views


def sslcli_step(method: str, precision: str) -> Result:
    """Time a step of sslcli's training loop: forward, backward, optimizer, momentum encoder and queue."""
    return timed(build_sslcli_step(method, precision), images=BATCH, warmup=1)


def build_sslcli_step(method: str, precision: str, *, bn_group: int | None = BATCH) -> Callable[[], None]:
    """Return the training step of sslcli. `bn_group` is the setting of MoCo v2."""
    from sslcli.backbones.resnet import ResNet
    from sslcli.engine import precision as formats
    from sslcli.methods.base import Batch
    from sslcli.methods.byol import BYOL
    from sslcli.methods.moco import MoCo
    from sslcli.methods.simclr import SimCLR
    from sslcli.runs.build import accelerate
    from sslcli.system.memory import keep_freed_memory

    keep_freed_memory()
    built = {
        "simclr": lambda net: SimCLR(net, hidden=512),
        "moco_v2": lambda net: MoCo(net, queue_size=4096, mlp_head=True, bn_group=bn_group),
        "byol": lambda net: BYOL(net, hidden=1024),
    }[method](ResNet("resnet18", image_size=SIZE))
    built = accelerate(built).train()
    optimizer = torch.optim.SGD(built.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    views = [view.to(memory_format=torch.channels_last) for view in random_views()]
    batch = Batch(views, torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.long))
    resolved = formats.resolve(precision, CPU)

    def step() -> None:
        with formats.autocast(CPU, resolved):
            loss = built(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        built.after_step(0.5)

    return step


def lightly_step(method: str, *, best: bool) -> Result:
    """Time a step of lightly's example of the method."""
    step, views = build_lightly_step(method, cifar_resnet18(), 512, best=best), random_views()
    return timed(lambda: step(views), images=BATCH, warmup=1)


def build_lightly_step(
    method: str,
    backbone: nn.Module,
    width: int,
    *,
    best: bool,
    temperature: float = 0.2,
    lr: Callable[[], float] = lambda: 0.06,
    device: torch.device = CPU,
    compiled: bool = False,
) -> Callable[[list[Tensor]], None]:
    """Return the training step of lightly's example of the method, a function of two views.

    Args:
        method: one of METHODS.
        backbone: network that returns `width` features.
        width: number of features.
        best: use bfloat16 if the device supports it natively, channels-last memory, and a fused optimizer on a GPU.
        temperature: temperature of the losses of SimCLR and MoCo v2.
        lr: function that returns the learning rate of the next step.
        device: device of the networks and the views.
        compiled: compile the networks with torch.compile.
    """
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    from sslcli.engine import precision as formats

    layers, loss_of = LIGHTLY[method](backbone, width, temperature)
    online = nn.ModuleList(layers).to(device)
    target = copy.deepcopy(online[:2]) if method != "simclr" else nn.ModuleList()
    deactivate_requires_grad(target)
    dtype = formats.resolve("auto", device) if best else "fp32"  # emulated bfloat16 is hundreds of times slower
    if best:
        online.to(memory_format=torch.channels_last)
        target.to(memory_format=torch.channels_last)
    for net in (*online, *target) if compiled else ():
        net.compile()
    fused = True if best and device.type == "cuda" else None
    optimizer = torch.optim.SGD(online.parameters(), lr=lr(), momentum=0.9, weight_decay=5e-4, fused=fused)

    def step(views: list[Tensor]) -> None:
        optimizer.param_groups[0]["lr"] = lr()
        if best:
            views = [view.to(memory_format=torch.channels_last) for view in views]
        for average, current in zip(target, online, strict=False):
            update_momentum(current, average, m=0.99)
        with formats.autocast(device, dtype):
            loss = loss_of(online, target, *views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lightly_simclr(
    backbone: nn.Module, width: int, temperature: float
) -> tuple[list[nn.Module], Callable[..., Tensor]]:
    """Return backbone and projection head, and the loss of (online, target, view 1, view 2)."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    criterion = NTXentLoss(temperature=temperature)

    def loss(net: nn.ModuleList, target: nn.ModuleList, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = (net[1](net[0](x).flatten(1)) for x in (x1, x2))
        return criterion(z1.float(), z2.float())  # type: ignore[no-any-return]

    return [backbone, SimCLRProjectionHead(width, width, 128)], loss


def lightly_moco(backbone: nn.Module, width: int, temperature: float) -> tuple[list[nn.Module], Callable[..., Tensor]]:
    """Return backbone and projection head, and the loss against a queue of 4,096 keys."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead

    criterion = NTXentLoss(temperature=temperature, memory_bank_size=(4096, 128))

    def loss(net: nn.ModuleList, target: nn.ModuleList, x1: Tensor, x2: Tensor) -> Tensor:
        query = net[1](net[0](x1).flatten(1))
        with torch.no_grad():
            key = target[1](target[0](x2).flatten(1))
        return criterion(query.float(), key.float())  # type: ignore[no-any-return]

    return [backbone, MoCoProjectionHead(width, width, 128)], loss


def lightly_byol(backbone: nn.Module, width: int, temperature: float) -> tuple[list[nn.Module], Callable[..., Tensor]]:
    """Return backbone, projection head and prediction head, and the symmetric loss; `temperature` is not used."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

    criterion = NegativeCosineSimilarity()

    def loss(net: nn.ModuleList, target: nn.ModuleList, x1: Tensor, x2: Tensor) -> Tensor:
        p1, p2 = (net[2](net[1](net[0](x).flatten(1))) for x in (x1, x2))
        with torch.no_grad():
            z1, z2 = (target[1](target[0](x).flatten(1)) for x in (x1, x2))
        return 0.5 * (criterion(p1.float(), z2.float()) + criterion(p2.float(), z1.float()))  # type: ignore[no-any-return]

    return [backbone, BYOLProjectionHead(width, 1024, 256), BYOLPredictionHead(256, 1024, 256)], loss


def stable_pretraining_step(method: str, *, best: bool) -> Result:
    """Time a step of stable-pretraining's `Trainer.fit` with the method."""
    from stable_pretraining_sides import fit

    return fit(method, best=best)


LIGHTLY = {"simclr": lightly_simclr, "moco_v2": lightly_moco, "byol": lightly_byol}

if __name__ == "__main__":
    variants: dict[str, Callable[[str], Result]] = {
        "sslcli": partial(sslcli_step, precision="auto"),
        "sslcli fp32": partial(sslcli_step, precision="fp32"),
        "lightly": partial(lightly_step, best=False),
        "lightly best": partial(lightly_step, best=True),
        "stable-pretraining": partial(stable_pretraining_step, best=False),
        "stable-pretraining best": partial(stable_pretraining_step, best=True),
    }
    run_benchmark({f"{method}/{name}": partial(step, method) for name, step in variants.items() for method in METHODS})
