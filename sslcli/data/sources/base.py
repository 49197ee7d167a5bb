"""What an image set is: images or files, labels, and the positions that make its splits.

A source has one position space. Memory sets are one uint8 tensor and need no workers; file sets
(`sslcli.data.sources.files`) are decoded by workers. Whether an image is held out for validation is a hash of its name
or number, so it depends neither on the order of a directory nor, but for a few images at the border, on other images.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslcli.data import rng
from sslcli.data.bad_images import BadImage as BadImage
from sslcli.data.bad_images import BadImages as BadImages
from sslcli.data.bad_images import TooManyBadImages as TooManyBadImages
from sslcli.data.bad_images import check_fraction
from sslcli.data.order import Layout
from sslcli.data.sources import shapes
from sslcli.data.sources.file_status import hashes_of, status_of
from sslcli.data.sources.picture import Opened as Opened
from sslcli.data.sources.picture import Picture as Picture
from sslcli.data.sources.picture import Whole as Whole
from sslcli.data.sources.records import Records, Tell, check_verify, label_codes, make_records
from sslcli.data.workers import default_workers
from sslcli.errors import ConfigError

_FINGERPRINT_IMAGES = 512


class Source:
    """A set of images with one position space; the base of all sets, and all of a set that fits in memory.

    Args:
        image_size: the side in pixels that views and evaluation crops start from, at least 1.
        limit: use only this many training images (the first in hash order, so that limits nest) and at most as many
            for validation; None or more than there are = all.
        val_fraction: the share in [0, 1) of the labeled training images that is held out as "val".
        workers: processes that decode; 0 = this one; None = `default_workers`. Memory sets use none.
        max_bad: the largest share in [0, 1] of images that may fail to decode before the run stops.
        verify: what a run that goes on compares with the images it began with: "times" names, labels, sizes and
            modification times, "sizes" all but the times, "contents" what is in the files, "none" nothing.
        mean, std: of each channel of images in [0, 1]; std positive.
        seed: of the split, and of the images of drawn sets.

    Attributes:
        images: (M, C, H, W) uint8, or None for a file set.
        labels: (M,) int64, -1 = unknown. classes: their names, [] without labels.
        splits: sorted int64 positions: "train", "val" (empty without labels), "test" where there is an official one.
        weights: (len(train),) how often an epoch shows each training image; None = once each.
        present: (M, modalities) bool, which modalities an image has; None = all.
        place: the channels of each modality, in order.
        photometric: the channels that the color operations of views change.
        scaled_decode: whether JPEG files are decoded at 1/2, 1/4 or 1/8 of their size where every crop that training
            cuts from one is shrunk at least so much anyway.

    Raises ValueError for a value outside its range.
    """

    images: Tensor | None = None
    labels: Tensor
    classes: list[str]
    splits: dict[str, Tensor]
    weights: Tensor | None = None
    present: Tensor | None = None
    place: Sequence[slice] = (slice(None),)
    photometric: slice = slice(None)
    scaled_decode: bool = False
    channels: int = 3
    name: str

    def __init__(
        self,
        *,
        image_size: int,
        limit: int | None = None,
        val_fraction: float = 0.1,
        workers: int | None = 0,
        max_bad: float = 0.01,
        verify: str = "times",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
        seed: int = 0,
    ) -> None:
        _check_count("image_size", image_size, least=1)
        if limit is not None:
            _check_count("limit", limit, least=1, remedy="; null means all images")
        if workers is not None:
            _check_count("workers", workers, least=0, remedy="; null means what pays on this machine")
        check_fraction("max_bad", max_bad)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"dataset.val_fraction is {val_fraction}, but it must be at least 0 and below 1")
        for key, values in (("mean", mean), ("std", std)):
            if len(values) != self.channels or not all(math.isfinite(value) for value in values):
                raise ValueError(
                    f"dataset.{key} is {list(values)}, but it must be {self.channels} numbers, one a channel"
                )
        if min(std) <= 0:
            raise ValueError(f"dataset.std is {list(std)}, but each must be above 0: it divides the pixels")
        self.image_size, self.limit, self.val_fraction = image_size, limit, val_fraction
        self.workers = default_workers(image_size) if workers is None else workers
        self.max_bad, self.seed = max_bad, seed
        self.verify = check_verify(verify)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    def __len__(self) -> int:
        """The number of positions M, whatever `limit` and the splits leave out."""
        return len(self.labels)

    @property
    def labeled(self) -> bool:
        """Whether any image has a label."""
        return bool((self.labels >= 0).any())

    @property
    def layout(self) -> Layout | None:
        """How the training images lie in shards; None where they can be read in any order."""
        return None

    def hold(self, positions: Tensor) -> None:
        """Get ready to read these (n,) positions, keeping what comes with them, until it is released."""

    def release(self, positions: Tensor) -> None:
        """Let go of what was held for these (n,) positions."""

    def open(self, position: int) -> Opened:
        """The image at `position` before it is decoded. Raises BadImage if it cannot be read."""
        assert self.images is not None
        return Whole(Image.fromarray(self.images[position].permute(1, 2, 0).numpy()))

    def read(self, position: int) -> Picture:
        """The image at `position`, RGB, of any size. Raises BadImage if it cannot be read."""
        return self.open(position).decode()

    def blank(self, size: int) -> Picture:
        """What stands where an image of an evaluation cannot be read."""
        return Image.new("RGB", (size, size))

    def path(self, position: int) -> str:
        """Where the image at `position` comes from, for messages."""
        return f"{self.name}[{position}]"

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell the set: sha256 of shape, labels and a strided sample of the pixels.

        It does not depend on `limit`, `val_fraction` or where the set lies.
        """
        assert self.images is not None
        sample = self.images[:: max(1, len(self) // _FINGERPRINT_IMAGES)].contiguous()
        return digest(
            (repr(tuple(self.images.shape)).encode(), self.labels.numpy().tobytes(), sample.numpy().tobytes())
        )

    def records(self, *, contents: bool = False, tell: Tell | None = None) -> Records:
        """Return the records that detect changed images (`sslcli.data.sources.records`). Files are at `path`.

        contents: also of what is in the files, which reads them all. tell: called now and then where that takes long.
        """
        labels = label_codes(self.labels, self.classes)
        if self.images is None:
            sizes, stamps = status_of(len(self), self.path, tell)
            hashes = hashes_of(len(self), self.path, tell) if contents else None
            names = (self.path(i).encode("utf-8", "surrogateescape") for i in range(len(self)))
            return make_records(names, labels, sizes=sizes, stamps=stamps, contents=hashes)
        # The lowest bit says that the pixels, which are in memory anyway, were looked at.
        sums = (zlib.crc32(np.ascontiguousarray(image).data) << 1 | 1 for image in self.images.numpy())
        names = (f"{self.name}[{i}]".encode("utf-8", "surrogateescape") for i in range(len(self)))
        return make_records(names, labels, contents=np.fromiter(sums, np.uint64, len(self)))

    @cached_property
    def version(self) -> str:
        """16 hex digits that change with any image: with its modification time too, unless the contents are compared.

        What is computed from the images and kept depends on it. It does not depend on where the set lies.
        """
        found = self.records(contents=self.verify == "contents")
        return digest((repr(self.classes).encode(), *found.digested()))

    def split(self, hashes: Tensor, *, labeled: Tensor, num_test: int = 0) -> None:
        """Set `splits`, the last `num_test` positions being the official test split.

        hashes: (M - num_test,) int64 of the training pool; the lowest are held out. Ties go by position.
        labeled: (M - num_test,) bool; only these are held out, for a probe needs labels.
        """
        num_pool = len(hashes)
        order = rng.mix(self.seed, hashes).argsort(stable=True)
        candidates = order[labeled[order]]
        val = candidates[: round(len(candidates) * self.val_fraction)]
        held_out = torch.zeros(num_pool, dtype=torch.bool)
        held_out[val] = True
        train = order[~held_out[order]]
        if len(train) == 0:
            raise ValueError(
                f"dataset.val_fraction is {self.val_fraction}, which leaves no image to train on of the {num_pool} "
                "there are: lower it"
            )
        self.splits = {"train": train[: self.limit].sort().values, "val": val[: self.limit].sort().values}
        if num_test:
            self.splits["test"] = torch.arange(num_pool, num_pool + num_test)


def replacement(source: Source, position: int, attempt: int) -> int:
    """The training position that stands in for a bad one: a pure function of its arguments, never `position` itself.

    attempt: 1, 2, ... until an image that can be read is found. Raises ConfigError if there is no other image.
    """
    train = source.splits["train"]
    at = int(rng.mix(source.seed, position, attempt)) % len(train)
    other = int(train[at])
    if other == position:
        other = int(train[(at + 1) % len(train)])
    if other == position:
        raise ConfigError(f"{source.path(position)} cannot be read and is the only training image: add images")
    return other


class Shapes(Source):
    """The embedded set: drawn shapes under nuisances, needing no download. See `sslcli.data.sources.shapes`.

    Args:
        train_images: number of the images that train and val are made of, at least 1.
        test_images: number of the test images, drawn with the indices after those; 0 = no test split.
        nuisances: strength in [0, 1] of each field of `shapes.Nuisances`; left out = 1.
        common: the keywords of `Source`; image_size at least 16.

    Images that `limit` leaves out are not drawn: their pixels are 0 and their labels -1.
    """

    def __init__(
        self,
        *,
        train_images: int = 10_000,
        test_images: int = 2_000,
        image_size: int = 32,
        nuisances: Mapping[str, float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(image_size=image_size, **common)
        _check_count("train_images", train_images, least=1)
        _check_count("test_images", test_images, least=0)
        self.nuisances = _nuisances(nuisances or {})
        self.name, self.classes = "shapes", list(shapes.CLASSES)
        pool = torch.arange(train_images)
        self.split(pool, labeled=torch.ones_like(pool, dtype=torch.bool), num_test=test_images)
        total = train_images + test_images
        self.images = torch.zeros(total, self.channels, image_size, image_size, dtype=torch.uint8)
        self.labels = torch.full((total,), -1)
        drawn = torch.cat(list(self.splits.values()))
        self.images[drawn], self.labels[drawn] = self.draw(drawn)
        self.recipe = f"{train_images} {test_images} {image_size} {self.seed} {self.nuisances}"

    def draw(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, S, S) uint8 and labels (n,) at `positions`, whether `limit` leaves them out or not."""
        return shapes.draw(positions, seed=self.seed, size=self.image_size, nuisances=self.nuisances)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of what is drawn, the same for every `limit`."""
        # Some pictures too: they tell apart versions of the drawing code.
        images, _ = self.draw(torch.arange(min(len(self), 64)))
        return digest((self.recipe.encode(), images.numpy().tobytes()))

    def records(self, *, contents: bool = False, tell: Tell | None = None) -> Records:
        """Return one record of what is drawn: there is no file that could change."""
        return make_records(
            [self.name.encode()], np.zeros(1, np.int64), contents=np.array([int(self.fingerprint, 16) | 1], np.uint64)
        )


class TorchvisionSet(Source):
    """CIFAR10, CIFAR100, STL10 or SVHN with their official test split, as one uint8 tensor.

    Args:
        name: one of these, as torchvision spells it.
        root: the folder that holds, or gets, the set's files.
        download: fetch the set if files are absent.
        unlabeled: STL10 only: add its 100,000 unlabeled images to the training pool.
        memory_gb: refuse a set whose pixels take more than this many GB (10**9 bytes); reading needs twice as much for
            a moment.
        common: the keywords of `Source`.

    Raises ValueError if files are absent and cannot be fetched, or are damaged.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str | os.PathLike[str],
        download: bool = True,
        unlabeled: bool = False,
        memory_gb: float = 4.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        from sslcli.data.sources import vision

        parts = vision.read_parts(name, root, download=download, unlabeled=unlabeled, memory_gb=memory_gb)
        self.name, self.classes = name.lower(), parts.classes
        self.images = torch.from_numpy(np.concatenate(parts.pixels))
        self.labels = torch.from_numpy(np.concatenate(parts.labels)).long()
        pool = torch.arange(len(self.images) - parts.num_test)
        self.split(pool, labeled=self.labels[: len(pool)] >= 0, num_test=parts.num_test)


def digest(parts: Iterable[bytes]) -> str:
    """16 hex digits of the sha256 of `parts`, each preceded by its length."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:16]


def check_flag(name: str, value: bool) -> bool:
    """`value`. Raises ValueError unless it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"dataset.{name} is {value!r}, but it must be true or false")
    return value


def _nuisances(strengths: Mapping[str, float]) -> shapes.Nuisances:
    known = list(shapes.Nuisances.__dataclass_fields__)
    for key, value in strengths.items():
        if key not in known:
            raise ValueError(f"dataset.nuisances has {key!r}, but there is only: {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"dataset.nuisances.{key} is {value!r}, but it must be a number from 0 to 1")
    return shapes.Nuisances(**strengths)


def _check_count(name: str, value: int, *, least: int, remedy: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"dataset.{name} is {value!r}, but it must be a whole number of at least {least}{remedy}")
