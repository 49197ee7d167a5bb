"""Context managers for evaluation mode and BatchNorm statistics, and a conversion to full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslcli.distributed import collectives


def full_precision(values: Tensor) -> Tensor:
    """Convert a tensor to float32. A float64 tensor is returned unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def double_precision(values: Tensor) -> Tensor:
    """Convert a tensor to float64, or to float32 on MPS, which has no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set `module` to evaluation mode within the `with` block, then restore the mode of every submodule."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def update_statistics(module: nn.Module, enabled: bool) -> None:
    """Select if BatchNorm layers inside `module` update their running statistics in training mode.

    In training mode, the layers normalize with the statistics of the batch in both cases. In evaluation mode, they
    normalize with the running statistics. Layers without running statistics are left unchanged.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.running_mean is not None:
            part.track_running_stats = enabled


@contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Save the running statistics of every BatchNorm before the `with` block, and restore them after the block."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextmanager
def statistics_of_main(module: nn.Module) -> Iterator[None]:
    """Let every process use the running statistics of rank 0 within the `with` block, and its own after the block.

    The statistics of processes differ if a BatchNorm is not synchronized. All processes must enter the block.
    """
    if collectives.world_size() == 1:
        yield
        return
    with unchanged_statistics(module):
        norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        collectives.broadcast([value for norm in norms for value in (norm.running_mean, norm.running_var)])
        yield
