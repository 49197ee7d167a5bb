"""From an image set to the batches of a run: which images a step sees, and their views on the device.

    source -> [worker: decode once, crop each view, uint8] -> device -> batched color operations -> Batch

The images of step t are a function of (seed, t) and their views of (seed, epoch, index): nothing here has state that
a checkpoint would need, and neither the number of workers nor that of processes changes a batch.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from itertools import chain, islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sslcli.data import rng
from sslcli.data.bad_images import BadImages
from sslcli.data.crops import PlainCrops, Request, ViewCrops, center_crop, joined, to_uint8
from sslcli.data.order import epoch_length, epoch_order, last_reads, shard_order
from sslcli.data.sources.base import Source
from sslcli.data.views import augment
from sslcli.data.views.views import Views
from sslcli.data.workers import PATIENCE, batches_of, check_shared_memory, list_of
from sslcli.distributed.collectives import rank, world_size
from sslcli.errors import ConfigError
from sslcli.methods.base import Batch


class Loader:
    """The batches of a training run.

    Args:
        source: the image set.
        views: what to make of each image.
        batch_size: images a step over all processes and micro-batches.
        accumulate: micro-batches a step.
        seed: of the order and the views.
        device: where batches go.
        patience: seconds to wait for the images of a batch.
    """

    def __init__(
        self,
        source: Source,
        views: Views,
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        device: torch.device,
        patience: float = PATIENCE,
    ) -> None:
        share = accumulate * world_size()
        if batch_size % share:
            raise ConfigError(
                f"train.batch_size is {batch_size}, but it must split evenly into {accumulate} micro-batches on "
                f"{world_size()} processes: choose a multiple of {share}"
            )
        num_images = epoch_length(len(source.splits["train"]), source.weights)
        if batch_size > num_images:
            raise ConfigError(
                f"train.batch_size is {batch_size}, but the training split of {source.name} has {num_images} images: "
                f"choose at most {num_images}"
            )
        self.source, self.views, self.seed, self.device = source, views, seed, device
        self.patience = patience
        self.batch_size, self.accumulate, self.part = batch_size, accumulate, batch_size // share
        self.steps_per_epoch = num_images // batch_size
        self.bad = BadImages(max_bad=source.max_bad, total=len(source.splits["train"]))
        # Every worker reads its own lanes of a set of shards, so each takes a piece of every micro-batch.
        self.layout = source.layout
        self.workers = source.workers if self.layout is None else min(source.workers, self.part)
        self.pieces = 1 if self.layout is None else max(1, self.workers)
        if source.images is None:
            pixels = sum(size * size for size in views.sizes(source.image_size))
            check_shared_memory(self.workers, self.part * source.channels * pixels // self.pieces)

    def position(self, step: int) -> dict[str, Any]:
        """Where a run is after `step` steps, as plain values: all that a checkpoint needs of the loader.

        images: of the training split. shards: the fingerprint of a set of shards, "" of others, where it takes long.
        """
        epoch, done = divmod(step, self.steps_per_epoch)
        shards = "" if self.layout is None else self.source.fingerprint
        images = len(self.source.splits["train"])
        return {"epoch": epoch, "image": done * self.batch_size, "images": images, "shards": shards}

    def check_position(self, step: int, saved: dict[str, Any] | None) -> None:
        """Raise ConfigError unless `saved`, if anything, is the position after `step` steps of the images there are."""
        here = self.position(step)
        if saved is None or saved == here:
            return
        changed = f"{saved['images']} then, {here['images']} now"
        raise ConfigError(
            f"the images of {self.source.name} are not those that the run began with "
            f"({changed if saved['images'] != here['images'] else 'other shards or labels'}), so it cannot go on where "
            f"it was, at image {saved['image']} of epoch {saved['epoch']}: put them back, or start another run"
        )

    def requests(self, start: int, stop: int) -> Iterator[Request]:
        """What this process needs for steps start to stop - 1: `pieces` requests a micro-batch, `accumulate` a step."""
        epoch = -1
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                columns = self.reads(epoch)
            for micro in range(self.accumulate):
                rows = [column[step % self.steps_per_epoch, micro].tensor_split(self.pieces) for column in columns]
                yield from (Request(*piece) for piece in zip(*rows, strict=True))

    def reads(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """What this process reads in an epoch: the columns of `Request`, each (steps, accumulate, part)."""
        shape = (self.steps_per_epoch, self.accumulate, world_size(), self.part)
        if self.layout is None:
            num_images = len(self.source.splits["train"])
            order = epoch_order(num_images, self.source.weights, seed=self.seed, epoch=epoch)
            index, visit = (column[: math.prod(shape)].view(shape)[:, :, rank()] for column in order)
            return index, visit, torch.zeros_like(index, dtype=torch.bool)
        whole = shard_order(self.layout, seed=self.seed, epoch=epoch, batch_size=self.batch_size)
        index = whole.view(shape)[:, :, rank()]
        pieces = torch.arange(self.part).tensor_split(self.pieces)
        reader = torch.cat([torch.full_like(piece, number) for number, piece in enumerate(pieces)]).expand_as(index)
        last = last_reads(self.layout.chunk[index].flatten(), reader.flatten())
        return index, torch.full_like(index, epoch), last.view_as(index)

    def steps(self, start: int, stop: int) -> Generator[list[Batch], None, None]:
        """The micro-batches of steps start to stop - 1. Closing the generator ends the workers."""
        batches = self.from_memory(start, stop) if self.source.images is not None else self.from_files(start, stop)
        for first in batches:
            yield [first, *(next(batches) for _ in range(self.accumulate - 1))]

    def from_memory(self, start: int, stop: int) -> Iterator[Batch]:
        assert self.source.images is not None
        for request in self.requests(start, stop):
            position = self.source.splits["train"][request.index]
            images = self.source.images[position]  # (n, C, H, W)
            if self.device.type == "cuda":  # a copy from other memory would have this process wait
                images = images.pin_memory()
            images = images.to(self.device, non_blocking=True)
            key = self.key(request)
            crops = [self.crop(images, key, numbers) for numbers in self.views.pairs]
            yield self.batch(request, crops, position)

    def crop(self, images: Tensor, key: Tensor, numbers: range) -> Tensor:
        """Crops of (n, C, H, W) images for some views, one view after the other: (len(numbers) * n, C, S, S)."""
        view, key = together(numbers, key)
        height, width = (torch.full((len(key),), side) for side in images.shape[2:])
        boxes = self.views.boxes(view, key, height, width).to(self.device, non_blocking=True)
        size = self.views.sizes(self.source.image_size)[numbers[0]]
        interpolation = self.views.views[numbers[0]].interpolation
        return augment.resized_crop(images.repeat(len(numbers), 1, 1, 1), boxes, size, interpolation=interpolation)

    def from_files(self, start: int, stop: int) -> Iterator[Batch]:
        crops = ViewCrops(self.source, self.views, self.seed)
        sampler = list_of(self.requests(start, stop))
        served = batches_of(crops, sampler, self.workers, owner=type(self.source), patience=self.patience)
        while pieces := list(islice(served, self.pieces)):
            requests, views, read, bad = zip(*pieces, strict=True)
            for path, reason in chain(*bad):
                self.bad.add(path, reason)
            self.bad.check()
            parts = [[part.to(self.device, non_blocking=True) for part in view] for view in zip(*views, strict=True)]
            pairs = [list(chain(*parts[numbers.start : numbers.stop])) for numbers in self.views.pairs]
            images = [(torch.cat(pair) if len(pair) > 1 else pair[0]).float().div_(255) for pair in pairs]
            yield self.batch(joined(requests), images, torch.cat(read))

    def batch(self, request: Request, crops: list[Tensor], read: Tensor) -> Batch:
        """Color operations on float crops in [0, 1], those of each of `pairs` together.

        They are of this process's images, which are those at positions `read`.
        """
        source, views = self.source, list[Tensor]()
        for numbers, images in zip(self.views.pairs, crops, strict=True):
            view, key = together(numbers, self.key(request))
            made = self.views.color(
                view, key, images, mean=source.mean, std=source.std, photometric=source.photometric
            ).contiguous(memory_format=torch.channels_last)
            views += made.tensor_split(len(numbers))
        label = source.labels[source.splits["train"][request.index]]
        present = None if source.present is None else source.present[read]
        return Batch(views, request.index, label, present).to(self.device)

    def key(self, request: Request) -> Tensor:
        return rng.mix(self.seed, request.visit, request.index)


def together(numbers: range, key: Tensor) -> tuple[Tensor, Tensor]:
    """View and key of each image of a batch that is repeated for each of some views."""
    return torch.tensor(numbers).repeat_interleave(len(key)), key.repeat(len(numbers))


def plain_batches(
    source: Source, positions: Tensor, *, batch_size: int, workers: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images for evaluation: uint8 (n, C, S, S) in the order of `positions`, and (n,) whether each could be read.

    Test transform: shorter side to S * 8 / 7, center crop; nothing where the image is S x S already.
    """
    chunks = list(torch.split(positions, batch_size))
    if source.images is None:
        workers = source.workers if workers is None else workers
        check_shared_memory(workers, min(batch_size, len(positions)) * source.channels * source.image_size**2)
        yield from batches_of(PlainCrops(source), chunks, workers, owner=type(source))
        return
    size = source.image_size
    for chunk in chunks:
        images = source.images[chunk]
        if images.shape[2:] != (size, size):
            images = to_uint8([center_crop(Image.fromarray(i.permute(1, 2, 0).numpy()), size) for i in images])
        yield images, torch.ones(len(chunk), dtype=torch.bool)
