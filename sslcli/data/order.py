"""Order of the training images in an epoch: a pure function of the seed and the epoch.

The images of a dataset with random access are permuted. A dataset of shards (described by a `Layout`) is split into
lanes, which are read in parallel, each from its start to its end:

    shards, concatenated in random order  | shard 3 | shard 0      | shard 4  | shard 1 | shard 2     |
    split into lanes of equal length      | lane 0         | lane 1         | lane 2         | lane 3  |
    each lane has a shuffle buffer; a batch has the same number of images from each lane:  0 0 1 1 2 2 3 3

A process gets a contiguous part of every batch. Therefore it reads only the lanes from which this part is taken. The
order does not depend on the number of processes or workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sslcli.data import rng

_MIN_SEGMENTS = 8  # minimum number of segments per lane; if the chunks are large, there may be fewer segments


@dataclass(frozen=True)
class Layout:
    """Location of the training images of a dataset of shards.

    Attributes:
        segment: (n,) number of the segment of each image, from 0, non-decreasing. A segment is a shard or a part of a
            large shard. The images of a segment are read in sequence. The shuffle buffer then changes their order.
        chunk: (n,) number of the chunk of each image, non-decreasing. A chunk is a part of a segment that is fetched
            with one read.
        lanes: number of lanes, at least 1. The segments are concatenated in random order and split into this number of
            lanes, which are read in parallel. Each lane has a shuffle buffer.
        buffer: total number of images in all shuffle buffers, at least 1.
    """

    segment: Tensor
    chunk: Tensor
    lanes: int
    buffer: int


def layout_of(shard: Tensor, chunk: Tensor, *, lanes: int, buffer: int) -> Layout:
    """Return the layout of n images of a dataset of shards.

    A shard with more than 1 / (8 * lanes) of the images is split into segments at chunk boundaries. Therefore, a
    dataset of a few large shards is shuffled as thoroughly as a dataset of many small shards.

    Args:
        shard: (n,) number of the shard of each image, non-decreasing.
        chunk: (n,) number of the chunk of each image, non-decreasing. A chunk is a part of a shard that is fetched with
            one read.
        lanes: number of lanes, at least 1. A lane is a sequence of images that is read in parallel with the other
            lanes, see `Layout`. Each lane has a buffer that shuffles its images.
        buffer: total number of images in the shuffle buffers of all lanes, at least 1.
    """
    position = torch.arange(len(shard))
    first_of_shard = torch.searchsorted(shard, shard)
    first_of_chunk = torch.searchsorted(chunk, chunk)
    part = (first_of_chunk - first_of_shard) // max(1, len(shard) // (_MIN_SEGMENTS * lanes))
    is_start = (position == first_of_chunk) & ((position == first_of_shard) | (part != part.roll(1)))
    return Layout(is_start.cumsum(0) - 1, chunk, lanes, buffer)


def epoch_length(num_images: int, weights: Tensor | None) -> int:
    """Return the number of images of an epoch. The last images are included even if they do not fill a batch.

    num_images: number n of images in the training split.
    weights: (n,) number of times that each image occurs in an epoch on average; None = once.
    """
    if weights is None:
        return num_images
    values = weights.tolist()
    return sum(round(values.count(weight) * weight) for weight in set(values))


def epoch_order(num_images: int, weights: Tensor | None, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Return the order of the training images of an epoch: (M,) index in the training split, and (M,) occurrence.

    M is the number of images of the epoch. Repetitions of an image are counted. The occurrence is
    epoch + repetition * 2**32. It is a key of the random numbers of the views. Therefore the repetitions of an image
    within an epoch get different views.

    num_images: number n of images in the training split.
    weights: (n,) weight of each image; None = all 1. An image of weight w occurs w times per epoch on average. If k
        images have the weight w, they occur round(k * w) times per epoch in total.
    """
    index, repeat = torch.arange(num_images), torch.zeros(num_images, dtype=torch.long)
    if weights is not None:
        priority = rng.uniform(rng.mix(seed, epoch, index), 0)
        parts = []
        for weight in sorted(set(weights.tolist())):
            members = index[weights == weight]
            repeats, remainder = int(weight), round(len(members) * weight) - int(weight) * len(members)
            parts += [(members, number) for number in range(repeats)]
            parts.append((members[priority[members].argsort()[:remainder]], repeats))
        index = torch.cat([members for members, _ in parts])
        repeat = torch.cat([torch.full_like(members, number) for members, number in parts])
    order = rng.permutation(len(index), seed, epoch)
    return index[order], epoch + (repeat[order] << 32)


def shard_order(layout: Layout, *, seed: int, epoch: int, batch_size: int) -> Tensor:
    """Return the order of the images of an epoch of a dataset of shards, without repeats.

    The result is (steps * batch_size,) int64 indices into the n images of the layout.

    The images are divided into lanes, which are read in parallel (see the module docstring). Each lane has a shuffle
    buffer with room for b images. The buffer is simulated by sorting: the i-th image that a lane reads gets the sort
    key i + b * u, with u uniform in [0, 1). With this order, an image is never used before it is read. At most b images
    have been read but not yet used. The images of any step are known without a replay of the earlier steps.
    """
    num_images = len(layout.segment)
    steps, lanes = num_images // batch_size, min(layout.lanes, batch_size)
    used = torch.arange(num_images)
    if num_images % batch_size:
        used = rng.permutation(num_images, seed, epoch, 0)[: steps * batch_size].sort().values
    rank = rng.permutation(int(layout.segment.max()) + 1, seed, epoch, 1).argsort()
    sequence = used[rank[layout.segment[used]].argsort(stable=True)]
    delay = rng.uniform(rng.mix(seed, epoch, sequence), 2).double()
    order = torch.empty(steps, batch_size, dtype=torch.int64)
    edges = [lane * batch_size // lanes for lane in range(lanes + 1)]  # index in a batch at which each lane begins
    for left, right in pairwise(edges):
        lane = slice(steps * left, steps * right)
        buffer = layout.buffer * (right - left) / batch_size
        shuffled = (torch.arange(steps * (right - left)) + buffer * delay[lane]).argsort(stable=True)
        order[:, left:right] = sequence[lane][shuffled].view(steps, right - left)
    return order.flatten()


def last_read_mask(chunk: Tensor, reader: Tensor) -> Tensor:
    """Return a mask (n,) bool, True for the last image that each reader (a data worker) reads from each chunk.

    After this image, the reader can free the chunk. A chunk is a part of a shard that is fetched with one read.

    chunk, reader: (n,) the chunk number and the reader number of each image, in the order of reading.
    """
    key = (chunk * (int(reader.max()) + 1) + reader).numpy()[::-1]
    _, found = np.unique(key, return_index=True)
    last = torch.zeros(len(chunk), dtype=torch.bool)
    last[len(chunk) - 1 - torch.from_numpy(found)] = True
    return last
