"""Momentum encoders: frozen copies of modules, and their update by an exponential moving average."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sslcli.distributed import collectives


def frozen_copy(module: nn.Module) -> Any:
    """Return a copy with requires_grad=False and without dropout or stochastic depth.

    The copy has its own buffers, whose initial values are those of the original. Its training mode can be changed as
    usual with `train` and `eval`.
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
    """Update target <- momentum * target + (1 - momentum) * online (BYOL eq. 1, MoCo eq. 2).

    Only parameters are updated, not buffers. If the networks are sharded, both must be sharded in the same way; each
    process updates its own shard.
    """
    averaged = [collectives.local(parameter) for parameter in target.parameters()]
    if averaged:  # a module may have no parameters
        learned = [collectives.local(parameter) for parameter in online.parameters()]
        torch._foreach_lerp_(averaged, learned, 1.0 - momentum)
