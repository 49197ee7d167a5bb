"""Processes of a run: who we are, gathers with and without gradient, shuffling a batch over all processes.

Everything here is the identity in a run of one process. Rows of a gathered tensor are in rank order, so a global
batch cut into contiguous parts comes back in its own order. Shapes: N rows a process, W processes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sslcli import heartbeat

T = TypeVar("T")
# Newer names of the same; torch 2.14 warns of the old ones.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size() -> int:
    """The number of processes W."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 <= rank < W."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        heartbeat.meet()
        dist.barrier()


@torch.no_grad()
def all_gather(rows: Tensor) -> Tensor:
    """(N, ...) of every process -> (W * N, ...), without gradient. N must be equal on all processes."""
    if world_size() == 1:
        return rows.detach()
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    heartbeat.meet()
    _gather(gathered, rows.detach().contiguous())
    return gathered


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return all_gather(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mine = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        heartbeat.meet()
        _reduce_scatter(mine, grad.contiguous())  # half the traffic of summing everywhere what each needs a part of
        return mine


def all_gather_with_grad(rows: Tensor) -> Tensor:
    """(N, ...) -> (W * N, ...); the gradient is that of the sum of all processes' losses.

    With gradients averaged over the processes, as DistributedDataParallel does, a loss that each process takes as
    the mean over its own rows gets exactly the gradient of one process with the whole batch.
    """
    return rows if world_size() == 1 else _GatherWithGrad.apply(rows)


@torch.no_grad()
def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, a new tensor."""
    value = value.detach().clone()
    if world_size() > 1:
        heartbeat.meet()
        dist.all_reduce(value)
        value /= world_size()
    return value


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded over the processes; any other tensor as it is."""
    # Asked by its method, since to import DTensor takes seconds.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_objects(mine: T) -> list[T]:
    """Plain objects of all processes, in rank order."""
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    heartbeat.meet()
    dist.all_gather_object(everyone, mine)
    return everyone


def broadcast_objects(values: list[Any]) -> None:
    """Replace the elements of `values` by those of the main process."""
    if world_size() > 1:
        heartbeat.meet()
        dist.broadcast_object_list(values, src=0)


def end_with(parent: int) -> None:
    """End this process with its `parent`, even when that is killed, so that no orphan holds a run (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before we asked
            os.kill(os.getpid(), signal.SIGKILL)


class BatchShuffle:
    """A random order of the W * N images of a step, the same on all processes (shuffling BN, MoCo sec. 3.3).

    The order is a function of `draw` alone, so a resumed run, or one with another number of processes, repeats it.
    Every process sends each of its rows to the one process that takes it, so the traffic does not grow with W.
    """

    def __init__(self, num_rows: int, draw: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0x5EED + draw)
        order = torch.randperm(world_size() * num_rows, generator=generator).view(world_size(), num_rows)
        owner = order // num_rows  # of each row, by the process and place that take it
        taken = owner == rank()
        leaving = order[taken] - rank() * num_rows  # my rows, by who takes them and where
        arriving = owner[rank()].argsort(stable=True)  # places of the shuffled part, by who sends them
        self.sent = taken.sum(1).tolist()  # rows to each process
        self.received = owner[rank()].bincount(minlength=world_size()).tolist()
        self.leaving, self.arriving = leaving.to(device), arriving.to(device)

    def shuffle(self, rows: Tensor) -> Tensor:
        """(N, ...) in batch order -> this process's (N, ...) of the shuffled batch, without gradient."""
        there = exchange(rows.detach()[self.leaving], self.sent, self.received)
        return there[self.arriving.argsort()]

    def restore(self, rows: Tensor) -> Tensor:
        """The inverse of `shuffle`."""
        back = exchange(rows.detach()[self.arriving], self.received, self.sent)
        return back[self.leaving.argsort()]


@torch.no_grad()
def exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send `sent[r]` of the rows (N, ...), in their order, to process r; what came, `received[r]` of r, by process."""
    if world_size() == 1:
        return rows
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    heartbeat.meet()
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
    return arrived
