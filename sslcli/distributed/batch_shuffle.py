"""Shuffling of a global batch over processes (shuffling BatchNorm, MoCo section 3.3)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sslcli.distributed.collectives import exchange, rank, world_size
from sslcli.distributed.devices import copy_to


class BatchShuffle:
    """Random permutation of the W * N images of a step, identical on all processes (shuffling BN, MoCo sec. 3.3).

    W is the number of processes, and N (`num_rows`) is the number of images per process. The permutation depends only
    on W * N and on `draw`, the number of permutations that the run has drawn before. It does not change if a run is
    resumed, or if the same batch of W * N images is split over another number of processes. Each image (a row of a
    tensor) is sent only to the process that needs it. Therefore the traffic per process does not grow with W.
    """

    def __init__(self, num_rows: int, draw: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0x5EED + draw)
        order = torch.randperm(world_size() * num_rows, generator=generator).view(world_size(), num_rows)
        owner = order // num_rows  # source rank of each row, by destination rank and position
        taken = owner == rank()
        leaving = order[taken] - rank() * num_rows  # indices of rows of this process, by destination rank and position
        arriving = owner[rank()].argsort(stable=True)  # positions in the shuffled part, by source rank
        self.sent = taken.sum(1).tolist()  # number of rows to each rank
        self.received = owner[rank()].bincount(minlength=world_size()).tolist()
        self.leaving, self.arriving = copy_to(device, torch.stack((leaving, arriving))).unbind()

    def shuffle(self, rows: Tensor) -> Tensor:
        """Return this process's part (N, ...) of the shuffled batch, without gradient.

        `rows` (N, ...) is this process's part of the batch in the original order.
        """
        there = exchange(rows.detach()[self.leaving], self.sent, self.received)
        return there[self.arriving.argsort()]

    def restore(self, rows: Tensor) -> Tensor:
        """Invert `shuffle`: return this process's part (N, ...) of the batch in the original order, without gradient.

        `rows` (N, ...) is this process's part of the shuffled batch.
        """
        back = exchange(rows.detach()[self.arriving], self.received, self.sent)
        return back[self.leaving.argsort()]


def shuffled(rows: Tensor, draw: Tensor, *, restore: bool = False) -> Tensor:
    """Return `BatchShuffle.shuffle` of `rows` (N, ...), or `BatchShuffle.restore` if `restore` is True.

    `draw` is a scalar int64 tensor on the CPU: the number of permutations that the run has drawn before. torch.compile
    does not compile this function, because the permutation is drawn on the CPU. It does not interrupt the graph either.
    """
    if torch.compiler.is_compiling():
        return _shuffled(rows.detach(), draw, restore)  # type: ignore[no-any-return]
    order = _order(len(rows), int(draw), rows.device, rank(), world_size())
    return order.restore(rows) if restore else order.shuffle(rows)


@lru_cache(maxsize=1)  # keys are restored by the permutation by which their images were shuffled before
def _order(num_rows: int, draw: int, device: torch.device, rank: int, world_size: int) -> BatchShuffle:
    """Return the permutation of a draw. It depends on `rank` and `world_size`, so these are keys of the cache."""
    return BatchShuffle(num_rows, draw, device)


@torch.library.custom_op("sslcli::shuffled", mutates_args=())
def _shuffled(rows: Tensor, draw: Tensor, restore: bool) -> Tensor:
    return torch.empty_like(rows).copy_(shuffled(rows, draw, restore=restore))


@_shuffled.register_fake
def _(rows: Tensor, draw: Tensor, restore: bool) -> Tensor:
    return torch.empty_like(rows)
