"""Momentum encoders: frozen copies of modules that are updated by an exponential moving average."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sslcli.distributed import collectives


def frozen_copy(module: nn.Module) -> Any:
    """Return a copy of `module` with requires_grad=False, without dropout and without stochastic depth.

    The copy has its own buffers, which start with the values of the buffers of `module`. `train` and `eval` change the
    mode of the copy as usual.
    """
    twin = copy.deepcopy(module).requires_grad_(False)
    for part in twin.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        if isinstance(getattr(part, "drop_prob", None), float):
            part.drop_prob = 0.0  # type: ignore[assignment]
    return twin


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Update target <- momentum * target + (1 - momentum) * online (BYOL eq. 1, MoCo eq. 2), in place.

    `target` and `online` are modules with the same parameters. Only parameters are updated, not buffers. If the modules
    are sharded, both must be sharded in the same way. Each process then updates its own shards.
    """
    averaged = [collectives.local(parameter) for parameter in target.parameters()]
    if averaged:  # a module may have no parameters
        learned = [collectives.local(parameter) for parameter in online.parameters()]
        torch._foreach_lerp_(averaged, learned, 1.0 - momentum)
