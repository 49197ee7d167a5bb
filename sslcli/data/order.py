"""The order in which an epoch shows the training images: a pure function of the seed and the epoch.

A set whose images can be read in any order is permuted. A set of shards has a `Layout` and is read in lanes:

    shards, in random order, end to end   | shard 3 | shard 0      | shard 4  | shard 1 | shard 2     |
    cut into lanes of equal length        | lane 0         | lane 1         | lane 2         | lane 3  |
    each lane through a shuffle buffer, and a batch takes as many images of each lane: 0 0 1 1 2 2 3 3

So a process that takes its contiguous part of every batch reads its own lanes, and the order knows nothing of
processes and workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sslcli.data import rng

_STRETCHES = 8  # a lane has at least so many, if shards can be cut that small


@dataclass(frozen=True)
class Layout:
    """How the training images of a set of shards lie in them.

    Attributes:
        stretch: (n,) the stretch of each image, from 0 on and nowhere decreasing: images that are shown one after
            another but for the shuffle buffer. A shard, or part of a large one.
        chunk: (n,) what is read at once, nowhere decreasing; a chunk lies within a stretch.
        lanes: stretches that are read side by side, at least 1.
        buffer: images in all shuffle buffers together, at least 1.
    """

    stretch: Tensor
    chunk: Tensor
    lanes: int
    buffer: int


def layout_of(shard: Tensor, chunk: Tensor, *, lanes: int, buffer: int) -> Layout:
    """The layout of images of which the shard (n,) and the chunk (n,) are known, both nowhere decreasing.

    A shard of more than 1 / (8 lanes) of the images is cut into stretches where chunks meet, so that a few large shards
    are shuffled as well as many small ones.
    """
    place = torch.arange(len(shard))
    first_of_shard = torch.searchsorted(shard, shard)
    first_of_chunk = torch.searchsorted(chunk, chunk)
    piece = (first_of_chunk - first_of_shard) // max(1, len(shard) // (_STRETCHES * lanes))
    begins = (place == first_of_chunk) & ((place == first_of_shard) | (piece != piece.roll(1)))
    return Layout(begins.cumsum(0) - 1, chunk, lanes, buffer)


def epoch_length(num_images: int, weights: Tensor | None) -> int:
    """How many images an epoch shows, before those that do not fill a batch are left out."""
    if weights is None:
        return num_images
    values = weights.tolist()
    return sum(round(values.count(weight) * weight) for weight in set(values))


def epoch_order(num_images: int, weights: Tensor | None, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """The training images of an epoch in their order: (M,) index and (M,) visit.

    `index` counts within the training split. An image of weight w comes w times an epoch on average over the images
    of that weight, exactly; `visit` tells the epoch and the repetition, so that repetitions get views of their own.
    """
    index, repeat = torch.arange(num_images), torch.zeros(num_images, dtype=torch.long)
    if weights is not None:
        lucky = rng.uniform(rng.mix(seed, epoch, index), 0)
        parts = []
        for weight in sorted(set(weights.tolist())):
            members = index[weights == weight]
            whole, left = int(weight), round(len(members) * weight) - int(weight) * len(members)
            parts += [(members, turn) for turn in range(whole)]
            parts.append((members[lucky[members].argsort()[:left]], whole))
        index = torch.cat([members for members, _ in parts])
        repeat = torch.cat([torch.full_like(members, turn) for members, turn in parts])
    order = rng.permutation(len(index), seed, epoch)
    return index[order], epoch + (repeat[order] << 32)


def shard_order(layout: Layout, *, seed: int, epoch: int, batch_size: int) -> Tensor:
    """The images of an epoch of a set of shards: (steps * batch_size,) of range(n), each at most once.

    The shuffle buffer is a sort: the image that a lane reads as number i comes out at the place of i + buffer * u among
    the others, u uniform in [0, 1). So no image comes out before it is read, no more than `buffer` images are read and
    not yet out, and what is in the buffer after any number of images is known without going through those before.
    """
    num_images = len(layout.stretch)
    steps, lanes = num_images // batch_size, min(layout.lanes, batch_size)
    kept = torch.arange(num_images)
    if num_images % batch_size:
        kept = rng.permutation(num_images, seed, epoch, 0)[: steps * batch_size].sort().values
    rank = rng.permutation(int(layout.stretch.max()) + 1, seed, epoch, 1).argsort()
    sequence = kept[rank[layout.stretch[kept]].argsort(stable=True)]
    delay = rng.uniform(rng.mix(seed, epoch, sequence), 2).double()
    order = torch.empty(steps, batch_size, dtype=torch.int64)
    edges = [lane * batch_size // lanes for lane in range(lanes + 1)]  # of the lanes within a batch
    for left, right in pairwise(edges):
        lane = slice(steps * left, steps * right)
        buffer = layout.buffer * (right - left) / batch_size
        out = (torch.arange(steps * (right - left)) + buffer * delay[lane]).argsort(stable=True)
        order[:, left:right] = sequence[lane][out].view(steps, right - left)
    return order.flatten()


def last_reads(chunk: Tensor, reader: Tensor) -> Tensor:
    """Of images in the order of reading, whether each is the last of its chunk that its reader reads: (n,) bool.

    chunk, reader: (n,) numbers of the chunk and of the reader of each.
    """
    key = (chunk * (int(reader.max()) + 1) + reader).numpy()[::-1]
    _, found = np.unique(key, return_index=True)
    last = torch.zeros(len(chunk), dtype=torch.bool)
    last[len(chunk) - 1 - torch.from_numpy(found)] = True
    return last
