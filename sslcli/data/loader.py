"""Data loader: selects the images of each step and returns their views on the device.

    source -> [worker: decode once, crop each view, uint8] -> device -> batched color operations -> Batch

The images of step t are a function of (seed, t). The views of an image are a function of (seed, epoch, index), where
index is the index of the image in the training split. If an epoch contains an image several times, the views also
depend on the number of the repetition. Therefore a checkpoint need not save any state of the loader, and the batches do
not depend on the number of workers or processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from functools import cached_property
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from sslcli.data import rng
from sslcli.data.bad_images import BadImages
from sslcli.data.crops import PlainCrops, Request, ViewCrops, center_crop, concat_requests, to_uint8
from sslcli.data.device_copies import HostBatch, copy_batches
from sslcli.data.num_workers import BatchMemory
from sslcli.data.order import epoch_length, epoch_order, last_read_mask, shard_order
from sslcli.data.pixels import as_picture
from sslcli.data.resident import is_resident, train_images
from sslcli.data.sources.base import Source
from sslcli.data.views import augment
from sslcli.data.views.views import Views
from sslcli.data.workers import DEFAULT_TIMEOUT, iterate_batches
from sslcli.distributed.collectives import rank, world_size
from sslcli.distributed.devices import copy_to
from sslcli.errors import ConfigError
from sslcli.methods.base import Batch

T = TypeVar("T")


class Loader:
    """Loader of the batches of a training run.

    Args:
        source: the dataset.
        views: the distributions from which the views of each image are drawn.
        batch_size: number of images per step, summed over all processes and micro-batches.
        accumulate: number of micro-batches per step.
        seed: seed of the order of the images and of the views.
        device: device to which the batches are copied.
        timeout: seconds to wait for the images of a batch.

    Raises ConfigError if the batch size is not a multiple of the number of processes times `accumulate`, or if an epoch
    has fewer images than a batch.
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
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        divisor = accumulate * world_size()
        if batch_size % divisor:
            raise ConfigError(
                f"train.batch_size is {batch_size}, but it must split evenly into {accumulate} micro-batches on "
                f"{world_size()} processes: choose a multiple of {divisor}"
            )
        num_images = epoch_length(len(source.splits["train"]), source.weights)
        if batch_size > num_images:
            raise ConfigError(
                f"train.batch_size is {batch_size}, but the training split of {source.name} has {num_images} images: "
                f"choose at most {num_images}"
            )
        self.source, self.views, self.seed, self.device = source, views, seed, device
        self.timeout = timeout
        self.batch_size, self.accumulate, self.micro_batch_size = batch_size, accumulate, batch_size // divisor
        self.steps_per_epoch = num_images // batch_size
        self.stride = 1  # `steps` skips all steps whose distance to its first step is not a multiple of this number
        self.bad = BadImages(max_bad=source.max_bad, total=len(source.splits["train"]))
        # A dataset of shards is read in parallel lanes (see order.py), and every worker reads its own lanes. Therefore
        # each micro-batch is split into one request per worker.
        self.layout = source.layout
        pixels = sum(size * size for size in views.sizes(source.image_size))
        self.memory = BatchMemory(self.micro_batch_size, source.channels * pixels, self.layout is not None)
        self.workers = self.num_workers()
        self.requests_per_batch = 1 if self.layout is None else max(1, self.workers)
        self.is_resident = is_resident(source, device)
        self.seconds_waited = 0.0  # time in which `steps` waited for images, see `timed`

    def num_workers(self) -> int:
        """Return the number of data workers.

        Raises ConfigError if the number that the user set needs too much memory. A default number is reduced instead.
        """
        if self.source.images is not None:
            return 0
        workers = self.source.workers if self.layout is None else min(self.source.workers, self.micro_batch_size)
        if self.source.chooses_workers:
            return self.memory.reduced_workers(workers)
        self.memory.check(workers)
        return workers

    def position(self, step: int) -> dict[str, Any]:
        """Return the position of a run in the training images after `step` steps, for a checkpoint.

        The keys are:
        - "epoch": the number of the epoch
        - "image": the number of images used so far in this epoch
        - "images": the number of images in the training split
        - "shards": the fingerprint of a dataset of shards; "" for other datasets, whose fingerprints take long to
          compute
        """
        epoch, done = divmod(step, self.steps_per_epoch)
        shards = "" if self.layout is None else self.source.fingerprint
        images = len(self.source.splits["train"])
        return {"epoch": epoch, "image": done * self.batch_size, "images": images, "shards": shards}

    def check_position(self, step: int, saved: dict[str, Any] | None) -> None:
        """Raise ConfigError if the images changed since a checkpoint was written. The run then cannot resume from it.

        step: number of steps after which the checkpoint was written.
        saved: the result of `position(step)` in the checkpoint; None = the checkpoint has none, and nothing is checked.
        """
        current = self.position(step)
        if saved is None or saved == current:
            return
        changed = f"{saved['images']} then, {current['images']} now"
        raise ConfigError(
            f"the images of {self.source.name} are not those that the run began with "
            f"({changed if saved['images'] != current['images'] else 'other shards or labels'}), so it cannot resume "
            f"at image {saved['image']} of epoch {saved['epoch']}: restore the images, or start another run"
        )

    def requests(self, start: int, stop: int) -> Iterator[Request]:
        """Yield the requests of this process to its data workers, for the steps from `start` to `stop` - 1.

        A step has `accumulate` micro-batches. A micro-batch is split into `requests_per_batch` requests.
        """
        epoch = -1
        for step in range(start, stop, self.stride):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                columns = self.request_columns(epoch)
            for micro in range(self.accumulate):
                rows = [
                    column[step % self.steps_per_epoch, micro].tensor_split(self.requests_per_batch)
                    for column in columns
                ]
                yield from (Request(*row) for row in zip(*rows, strict=True))

    def request_columns(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return index, occurrence and is_last_read (see `Request`) of all images that this process reads in an epoch.

        Each field is a tensor of shape (steps per epoch, accumulate, micro_batch_size).
        """
        shape = (self.steps_per_epoch, self.accumulate, world_size(), self.micro_batch_size)
        if self.layout is None:
            num_images = len(self.source.splits["train"])
            order = epoch_order(num_images, self.source.weights, seed=self.seed, epoch=epoch)
            index, occurrence = (column[: math.prod(shape)].view(shape)[:, :, rank()] for column in order)
            return index, occurrence, torch.zeros_like(index, dtype=torch.bool)
        sequence = shard_order(self.layout, seed=self.seed, epoch=epoch, batch_size=self.batch_size)
        index = sequence.view(shape)[:, :, rank()]
        slots = torch.arange(self.micro_batch_size).tensor_split(self.requests_per_batch)
        reader = torch.cat([torch.full_like(part, number) for number, part in enumerate(slots)]).expand_as(index)
        is_last_read = last_read_mask(self.layout.chunk[index].flatten(), reader.flatten())
        return index, torch.full_like(index, epoch), is_last_read.view_as(index)

    def steps(self, start: int, stop: int) -> Generator[list[Batch], None, None]:
        """Yield a list of the micro-batches of each step from `start` to `stop` - 1.

        When the generator is closed, the data workers end.
        """
        hosts = self.from_memory(start, stop) if self.source.images is not None else self.from_files(start, stop)
        # A GPU computes asynchronously: to launch its kernels is not to wait for images, even if the launch blocks. On
        # a CPU, all computations of the views delay the step.
        is_cpu = self.device.type == "cpu"
        batches = self.on_device(hosts if is_cpu else self.timed(hosts))
        batches = self.timed(batches) if is_cpu else batches
        for first in batches:
            yield [first, *(next(batches) for _ in range(self.accumulate - 1))]

    def timed(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items, and add the time that they take to `seconds_waited`."""
        while True:
            before = time.perf_counter()
            item = next(items, None)
            self.seconds_waited += time.perf_counter() - before
            if item is None:
                return
            yield item

    def on_device(self, hosts: Iterator[HostBatch]) -> Iterator[Batch]:
        """Copy micro-batches to the device, and yield their views."""
        for host, tensors in copy_batches(hosts, self.device):
            if self.source.images is None:
                crops = self.crops_of_workers(tensors)
            else:
                images = self.resident_images[tensors[0]] if self.is_resident else tensors[0]
                key = self.key(host.request)
                crops = [self.crop(images, key, numbers) for numbers in self.views.groups]
            yield self.batch(host.request, crops, host.read)

    @cached_property
    def resident_images(self) -> Tensor:
        """The training images on the device: (len(train), C, H, W) uint8."""
        return train_images(self.source, self.device)

    def from_memory(self, start: int, stop: int) -> Iterator[HostBatch]:
        """Yield the micro-batches of the steps from `start` to `stop` - 1, for a dataset in memory.

        Their only tensor is the images (n, C, H, W), or the indices of resident images (n,).
        """
        assert self.source.images is not None
        for request in self.requests(start, stop):
            position = self.source.splits["train"][request.index]
            yield HostBatch(request, position, [request.index if self.is_resident else self.source.images[position]])

    def crop(self, images: Tensor, key: Tensor, numbers: range) -> Tensor:
        """Crop n images for several views of one size. Return (len(numbers) * n, C, S, S), ordered by view.

        The first n crops belong to the first view, and so on.

        images: (n, C, H, W) uint8.
        key: (n,) int64. All random numbers of an image are computed from its key.
        numbers: indices of these views among all views of an image.
        """
        view, key = repeat_for_views(numbers, key)
        height, width = (torch.full((len(key),), side) for side in images.shape[2:])
        boxes = copy_to(self.device, self.views.boxes(view, key, height, width))
        size = self.views.sizes(self.source.image_size)[numbers[0]]
        interpolation = self.views.views[numbers[0]].interpolation
        return augment.resized_crop(images.repeat(len(numbers), 1, 1, 1), boxes, size, interpolation=interpolation)

    def from_files(self, start: int, stop: int) -> Iterator[HostBatch]:
        """Yield the micro-batches of the steps from `start` to `stop` - 1, for a dataset of files or shards.

        Their tensors are the parts of the first view, one part per request, then the parts of the second view, etc.
        """
        crops = ViewCrops(self.source, self.views, self.seed)
        items = iterate_batches(
            crops,
            self.requests(start, stop),
            self.workers,
            owner=type(self.source),
            timeout=self.timeout,
            memory=self.memory,
            pin_memory=self.device.type == "cuda",
        )
        while group := list(islice(items, self.requests_per_batch)):
            requests, views, read, bad = zip(*group, strict=True)
            for path, reason in chain(*bad):
                self.bad.add(path, reason)
            self.bad.check()
            yield HostBatch(concat_requests(requests), torch.cat(read), list(chain(*zip(*views, strict=True))))

    def crops_of_workers(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the crops that `batch` needs. `parts` are the tensors of `from_files`, on the device."""
        views = list(zip(*[iter(parts)] * self.requests_per_batch, strict=True))
        groups = [list(chain(*views[numbers.start : numbers.stop])) for numbers in self.views.groups]
        return [(torch.cat(group) if len(group) > 1 else group[0]).float().div_(255) for group in groups]

    def batch(self, request: Request, crops: list[Tensor], read: Tensor) -> Batch:
        """Apply the color operations to the crops of a micro-batch of n images, and return the batch.

        Args:
            request: the request for these images.
            crops: float in [0, 1], one tensor for each group of `Views.groups`. A group of v views has a tensor of
                shape (v * n, C, S, S). Its first n crops belong to the first view of the group, and so on.
            read: (n,) positions of the images that were read. Bad images are replaced, see `ViewCrops`.
        """
        source, views = self.source, list[Tensor]()
        for numbers, images in zip(self.views.groups, crops, strict=True):
            views += self.color(request, images, numbers)
        label = source.labels[source.splits["train"][request.index]]
        present = None if source.present is None else source.present[read]
        return Batch(views, request.index, label, present).to(self.device)

    def color(self, request: Request, images: Tensor, numbers: range) -> tuple[Tensor, ...]:
        """Apply the color operations of several views to their crops. Return one tensor (n, C, S, S) per view.

        request: the request for the n images.
        images: (len(numbers) * n, C, S, S) float in [0, 1]. The first n crops belong to the first view, and so on.
        numbers: indices of these views among all views of an image.
        """
        view, key = repeat_for_views(numbers, self.key(request))
        mean, std = self.source.mean, self.source.std
        colored = self.views.color(view, key, images, mean=mean, std=std, photometric=self.source.photometric)
        return colored.contiguous(memory_format=torch.channels_last).tensor_split(len(numbers))

    def key(self, request: Request) -> Tensor:
        """Return one key per image of a request: (n,) int64.

        All random numbers of the views of an image are computed from its key.
        """
        return rng.mix(self.seed, request.occurrence, request.index)


def repeat_for_views(numbers: range, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the view number and the image key of each row of a batch with len(numbers) views of n images.

    Both results are (len(numbers) * n,) int64. The first n rows belong to the first view, and so on.

    numbers: indices of these views among all views of an image.
    key: (n,) int64, the key of each image, from which all of its random numbers are computed.
    """
    return torch.tensor(numbers).repeat_interleave(len(key)), key.repeat(len(numbers))


def plain_batches(
    source: Source, positions: Tensor, *, batch_size: int, workers: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images for evaluation, in the order of `positions`.

    A batch is a tuple of the images (n, C, S, S) uint8 and a mask (n,) bool. The mask is True for images that could be
    read. The shorter side of each image is resized to S * 8 / 7 pixels, and the center is cropped to S x S pixels.
    Images of S x S pixels are not changed.

    Args:
        source: the dataset; its `image_size` is S.
        positions: (M,) int64, the positions of the images in `source`.
        batch_size: number of images per batch; the last batch may be smaller.
        workers: number of data workers; None = `source.workers`. Datasets in memory use no workers.
    """
    chunks = list(torch.split(positions, batch_size))
    if source.images is None:
        memory = BatchMemory(min(batch_size, len(positions)), source.channels * source.image_size**2)
        wanted = min(source.workers if workers is None else workers, len(chunks))
        if workers is None:
            wanted = memory.reduced_workers(wanted)
        else:
            memory.check(wanted)
        pin_memory = torch.cuda.is_available()
        yield from iterate_batches(
            PlainCrops(source), chunks, wanted, owner=type(source), memory=memory, pin_memory=pin_memory
        )
        return
    size = source.image_size
    for chunk in chunks:
        images = source.images[chunk]
        if images.shape[2:] != (size, size):
            images = to_uint8([center_crop(as_picture(i.permute(1, 2, 0).numpy()), size) for i in images])
        yield images, torch.ones(len(chunk), dtype=torch.bool)
