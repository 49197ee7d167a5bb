"""Communication between processes: rank, world size, collectives with and without gradient, and exchange of rows.

A row is an entry of a tensor along the first dimension. With a single process, all collectives return their input. A
gathered tensor has the rows of all processes in rank order. If a global batch was split into contiguous parts,
gathering the parts therefore restores the original order.

Shapes: N rows per process, W processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sslcli.distributed import watchdog

T = TypeVar("T")
# Use the new names of these functions if they exist, because torch 2.14 warns about the old names.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_alone = False  # True within `single_process`


@contextmanager
def single_process() -> Iterator[None]:
    """Let this process act as a run with one process within the `with` block.

    All collectives then return their input, `rank()` is 0, and `world_size()` is 1.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def all_processes() -> Iterator[None]:
    """Let this process act as one of all processes again within the `with` block, inside of `single_process`."""
    global _alone
    before, _alone = _alone, False
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Return the number of processes of the run, or 1 within `single_process`."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, at least 0 and less than the number of processes."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Return True on rank 0. Rank 0 is the main process: it writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if world_size() > 1:
        watchdog.record_collective()
        dist.barrier()


@torch.no_grad()
def all_gather(rows: Tensor) -> Tensor:
    """Gather the rows (N, ...) of all W processes to (W * N, ...), without gradient.

    N must be equal on all processes.
    """
    if world_size() == 1:
        return rows.detach()
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    watchdog.record_collective()
    _gather(gathered, rows.detach().contiguous())
    return gathered


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return all_gather(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mine = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        watchdog.record_collective()
        _reduce_scatter(mine, grad.contiguous())  # half the traffic of an all-reduce
        return mine


def all_gather_with_grad(rows: Tensor) -> Tensor:
    """Gather the rows (N, ...) of all processes to (W * N, ...), with gradient. W is the number of processes.

    The backward pass computes the gradient of the sum of the losses of all processes. DistributedDataParallel averages
    this gradient over processes. If each process computes the mean loss over its own rows, the average equals the
    gradient of a single process with the global batch.
    """
    return rows if world_size() == 1 else _GatherWithGrad.apply(rows)


@torch.no_grad()
def all_reduce_mean(value: Tensor) -> Tensor:
    """Return the mean of `value` over all processes as a new tensor, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        watchdog.record_collective()
        dist.all_reduce(value)
        value /= world_size()
    return value


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor (DTensor). Return any other tensor unchanged."""
    # hasattr replaces isinstance, because importing DTensor takes seconds.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (DTensor) from all processes. Return any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_objects(mine: T) -> list[T]:
    """Gather one picklable object from each process. Return the list of all objects in rank order."""
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    watchdog.record_collective()
    dist.all_gather_object(everyone, mine)
    return everyone


def broadcast_objects(values: list[Any]) -> None:
    """Replace the elements of the list `values` with the elements of the list on rank 0, in place."""
    if world_size() > 1:
        watchdog.record_collective()
        dist.broadcast_object_list(values, src=0)


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor | None]) -> None:
    """Replace the values of `tensors` by those of rank 0, in place. All tensors have one dtype; None is skipped."""
    found = [tensor for tensor in tensors if tensor is not None]
    if world_size() == 1 or not found:
        return
    flat = torch.cat([tensor.flatten() for tensor in found])
    watchdog.record_collective()
    dist.broadcast(flat, src=0)
    for tensor, value in zip(found, torch.split(flat, [tensor.numel() for tensor in found]), strict=True):
        tensor.copy_(value.view_as(tensor))


@torch.no_grad()
def exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send rows to all ranks, and return the rows received from all ranks in rank order.

    Args:
        rows: (N, ...), in the order of their destination ranks. The result of channels-last images is channels-last.
        sent: number of rows to send to each rank; the sum is N.
        received: number of rows that arrive from each rank.

    Returns:
        (sum(received), ...).
    """
    if world_size() == 1:
        return rows
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):  # whose rows are contiguous
        return exchange(rows.permute(0, 2, 3, 1), sent, received).permute(0, 3, 1, 2)
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    watchdog.record_collective()
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
    return arrived
