"""Base class of all datasets (images, labels and splits), and the datasets in memory.

In the code, a dataset is called a source. The images of all its splits are numbered together. The number of an image
is called its position. A dataset in memory is one uint8 tensor and needs no worker processes. The images of datasets of
files (`sslcli.data.sources.files`) are decoded by worker processes. A hash of an image's name or number decides whether
the image is held out for validation. Therefore the order of the files in a directory has no effect on the held-out
split. If images are added or removed, nearly all other images stay in their split.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslcli.config.moved import reject_old_attributes
from sslcli.data import rng
from sslcli.data.bad_images import BadImage as BadImage
from sslcli.data.bad_images import BadImages as BadImages
from sslcli.data.bad_images import TooManyBadImages as TooManyBadImages
from sslcli.data.bad_images import check_fraction
from sslcli.data.num_workers import default_workers
from sslcli.data.order import Layout
from sslcli.data.pixels import as_picture
from sslcli.data.sources import shapes
from sslcli.data.sources.file_status import hashes_of, status_of
from sslcli.data.sources.picture import DecodedImage as DecodedImage
from sslcli.data.sources.picture import OpenedImage as OpenedImage
from sslcli.data.sources.picture import Picture as Picture
from sslcli.data.sources.records import ProgressCallback, Records, check_verify, digest, label_codes, make_records
from sslcli.data.sources.split import train_and_val
from sslcli.errors import ConfigError, check_integer

_FINGERPRINT_IMAGES = 512


RENAMED = {"place": "modality_channels"}  # class attributes of version 0.1


class Source:
    """Base class of all datasets. It implements datasets in memory completely.

    Args:
        image_size: side in pixels of views and evaluation crops, at least 1.
        limit: the largest number of training images, and of validation images; None = no limit. The images are sorted
            by a hash, and the first ones are selected. Therefore the images of a smaller limit are a subset of the
            images of a larger limit.
        val_fraction: fraction in [0, 1) of the labeled training images that forms the split "val".
        pretrain_on_val: whether the images that `val_fraction` selects are also in "train". In both cases, no
            evaluation protocol trains on the label of an image on which it reports an accuracy. The yaml files of the
            built-in datasets set true. The default here is False, because older plug-ins with datasets expect that
            "val" is never in "train".
        workers: number of worker processes that decode images; 0 = decode in this process; None = `default_workers`.
            Datasets in memory use no workers.
        max_bad: the largest fraction in [0, 1] of images that may fail to decode before the run stops.
        verify: properties of the images that a resumed run compares, to detect images that changed since the run was
            started. "sizes" compares names, labels and sizes. "times" also compares modification times, and "contents"
            also compares hashes of the contents. "none" compares nothing.
        mean, std: mean and standard deviation of each channel, for images in [0, 1]. Each std must be above 0.
        seed: seed of the split, and of the images of generated datasets.

    Attributes:
        images: (M, C, H, W) uint8, the pixels of the M images of all splits; None for a dataset of files.
        labels: (M,) int64, -1 = unknown.
        classes: the class names; [] without labels.
        splits: name of a split -> the sorted int64 positions of its images. "train" is for pre-training. "val" may be a
            part of "train", and is empty if no image has a label. "test" exists only if the dataset has an official
            test split.
        weights: (len(train),) number of times that each training image occurs in an epoch; None = once.
        present: (M, modalities) bool, True if an image has a modality, such as color or depth; None = all True.
        modality_channels: the channels of each modality, in order.
        photometric: the channels to which the color operations of views are applied.
        chooses_workers: True if `workers` was chosen by `default_workers`. Callers may then reduce the number.
        resident: whether the training images of a dataset in memory are copied to the GPU once: True, False or "auto",
            see `sslcli.data.resident`.
        scaled_decode: True if JPEGs may be decoded at 1/n of their size, with n = 2, 4 or 8. A JPEG is decoded at 1/n
            only if all of its training crops are downscaled at least by the factor n.

    Raises ValueError if a value is out of range.
    """

    images: Tensor | None = None
    labels: Tensor
    classes: list[str]
    splits: dict[str, Tensor]
    weights: Tensor | None = None
    present: Tensor | None = None
    modality_channels: Sequence[slice] = (slice(None),)
    photometric: slice = slice(None)
    chooses_workers: bool = False
    resident: bool | str = False
    scaled_decode: bool = False
    channels: int = 3
    name: str

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Raise ConfigError if a subclass sets an attribute whose name was valid only in version 0.1."""
        super().__init_subclass__(**keywords)
        reject_old_attributes(cls, RENAMED)

    def __init__(
        self,
        *,
        image_size: int,
        limit: int | None = None,
        val_fraction: float = 0.1,
        pretrain_on_val: bool = False,
        workers: int | None = 0,
        max_bad: float = 0.01,
        verify: str = "times",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
        seed: int = 0,
    ) -> None:
        check_integer("dataset.image_size", image_size, minimum=1)
        if limit is not None:
            check_integer("dataset.limit", limit, minimum=1, hint="; null means all images")
        if workers is not None:
            check_integer("dataset.workers", workers, minimum=0, hint="; null chooses a number for this machine")
        check_fraction("max_bad", max_bad)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"dataset.val_fraction is {val_fraction}, but it must be at least 0 and below 1")
        for key, values in (("mean", mean), ("std", std)):
            if len(values) != self.channels or not all(math.isfinite(value) for value in values):
                raise ValueError(
                    f"dataset.{key} is {list(values)}, but it must be {self.channels} numbers, one per channel"
                )
        if min(std) <= 0:
            raise ValueError(f"dataset.std is {list(std)}, but each must be above 0, because it divides the pixels")
        self.image_size, self.limit, self.val_fraction = image_size, limit, val_fraction
        self.pretrain_on_val = check_flag("pretrain_on_val", pretrain_on_val)
        self.chooses_workers = workers is None
        self.workers = default_workers(image_size) if workers is None else workers
        self.max_bad, self.seed = max_bad, seed
        self.verify = check_verify(verify)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    def __len__(self) -> int:
        """Number of images M, including the images that are in no split because of `limit`."""
        return len(self.labels)

    @property
    def has_labels(self) -> bool:
        """Whether any image has a label."""
        return bool((self.labels >= 0).any())

    @property
    def layout(self) -> Layout | None:
        """Layout of the training images in shards; None for datasets with random access."""
        return None

    def hold(self, positions: Tensor) -> None:
        """Fetch the data of the images at `positions` (n,) and keep it until `release` is called.

        This method does nothing for datasets with random access.
        """

    def release(self, positions: Tensor) -> None:
        """Free the data that `hold` fetched for the images at `positions` (n,)."""

    def open(self, position: int) -> OpenedImage:
        """Open the image at `position` without decoding it. Raises BadImage for an unreadable image."""
        assert self.images is not None
        return DecodedImage(as_picture(self.images[position].permute(1, 2, 0).numpy()))

    def read(self, position: int) -> Picture:
        """Return the image at `position` at full size. Raises BadImage if the image cannot be read."""
        return self.open(position).decode()

    def stored_size(self, position: int) -> tuple[int, int] | None:
        """Return width and height in pixels of the stored image at `position`, or None if they are unknown.

        Subclasses read the size from the file of the image. They return None if this fails or may be slow.
        """
        return None

    def blank(self, size: int) -> Picture:
        """Return a black image of `size` x `size` pixels. It replaces an evaluation image that cannot be read."""
        return as_picture(np.zeros((size, size, self.channels), np.uint8))

    def path(self, position: int) -> str:
        """Return the path or another description of the image at `position`, for messages."""
        return f"{self.name}[{position}]"

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the dataset in 16 hex digits.

        The digits are the start of a sha256. The hash includes the shape of `images`, all labels, and the pixels of
        images at evenly spaced positions. It does not depend on `limit`, `val_fraction` or the location of the dataset.
        """
        assert self.images is not None
        sample = self.images[:: max(1, len(self) // _FINGERPRINT_IMAGES)].contiguous()
        return digest(
            (repr(tuple(self.images.shape)).encode(), self.labels.numpy().tobytes(), sample.numpy().tobytes())
        )

    def records(self, *, contents: bool = False, on_progress: ProgressCallback | None = None) -> Records:
        """Return the records of the images. A resumed run compares records to detect images that changed.

        A record consists of a name, a size, a modification time, and hashes of the label and of the contents, see
        `sslcli.data.sources.records`.

        If the images are not in memory, this method reads the file `path(i)` for each image i. If `path(i)` is not the
        path of a file, the size and the time of image i are recorded as unknown.

        contents: whether to hash the contents of the files. Images in memory are always hashed.
        on_progress: callback that reports the progress of long calls.
        """
        labels = label_codes(self.labels, self.classes)
        if self.images is None:
            sizes, stamps = status_of(len(self), self.path, on_progress)
            hashes = hashes_of(len(self), self.path, on_progress) if contents else None
            names = (self.path(i).encode("utf-8", "surrogateescape") for i in range(len(self)))
            return make_records(names, labels, sizes=sizes, stamps=stamps, contents=hashes)
        # The lowest bit of a hash is 1, so no hash equals `UNKNOWN`. Pixels in memory are always hashed.
        sums = (zlib.crc32(np.ascontiguousarray(image).data) << 1 | 1 for image in self.images.numpy())
        names = (f"{self.name}[{i}]".encode("utf-8", "surrogateescape") for i in range(len(self)))
        return make_records(names, labels, contents=np.fromiter(sums, np.uint64, len(self)))

    @cached_property
    def version(self) -> str:
        """Version of the images in 16 hex digits. It is the cache key of all results that are computed from the images.

        The version changes if any image changes. It also changes if a modification time changes, unless the contents
        are hashed (if `verify` is "contents", and for datasets in memory). It does not depend on the location of the
        dataset.
        """
        records = self.records(contents=self.verify == "contents")
        return digest((repr(self.classes).encode(), *records.digested()))

    def split(self, hashes: Tensor, *, labeled: Tensor, num_test: int = 0, held_out: Tensor | None = None) -> None:
        """Divide the M images of the dataset into `splits`. The last `num_test` positions are the official test split.

        The other images form the training pool. hashes, labeled and held_out (M - num_test,) have one value per image
        of this pool: see `train_and_val`.
        """
        train, val = train_and_val(
            hashes,
            labeled=labeled,
            held_out=held_out,
            seed=self.seed,
            val_fraction=self.val_fraction,
            pretrain_on_val=self.pretrain_on_val,
            limit=self.limit,
        )
        self.splits = {"train": train, "val": val}
        if num_test:
            self.splits["test"] = torch.arange(len(hashes), len(hashes) + num_test)

    def nonempty_splits(self) -> dict[str, Tensor]:
        """Return the splits that contain at least one image."""
        return {name: positions for name, positions in self.splits.items() if len(positions)}

    def used(self) -> Tensor:
        """Return the sorted positions (n,) of all images that are in a split."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        for positions in self.splits.values():
            mask[positions] = True
        return mask.nonzero().flatten()

    def without_labels_of(self, *names: str) -> Tensor:
        """Return the positions (n,) of the training images that are in none of the splits `names`.

        A protocol may train on the labels of these images if it reports on the splits `names`.
        """
        excluded = torch.zeros(len(self), dtype=torch.bool)
        for name in names:
            if name in self.splits:
                excluded[self.splits[name]] = True
        train = self.splits["train"]
        return train[~excluded[train]]

    @property
    def has_val_in_train(self) -> bool:
        """Whether any image of "val" is also in "train"."""
        return len(self.without_labels_of("val")) < len(self.splits["train"])


def replacement(source: Source, position: int, attempt: int) -> int:
    """Return the position of a training image that replaces the unreadable image at `position`.

    The result is never `position`. It depends only on the arguments. Callers try attempt = 1, 2, ... until an image
    is readable.

    Raises ConfigError if there is no other training image.
    """
    train = source.splits["train"]
    index = int(rng.mix(source.seed, position, attempt)) % len(train)
    other = int(train[index])
    if other == position:
        other = int(train[(index + 1) % len(train)])
    if other == position:
        raise ConfigError(f"{source.path(position)} cannot be read and is the only training image: add images")
    return other


class Shapes(Source):
    """Built-in dataset of generated images of shapes, without download. See `sslcli.data.sources.shapes`.

    Args:
        train_images: number of images in train and val together, at least 1.
        test_images: number of test images; 0 = no test split. The test images have the last positions.
        nuisances: how strongly properties other than the shape vary, such as the color. The keys are fields of
            `shapes.Nuisances`, and the values are strengths in [0, 1]. The default strength is 1.
        resident: whether the training images are copied to the GPU once: True, False or "auto".
        common: the arguments of `Source`. `image_size` must be at least 16.

    If `limit` excludes an image from all splits, it is not generated: its pixels are 0 and its label is -1.
    """

    def __init__(
        self,
        *,
        train_images: int = 10_000,
        test_images: int = 2_000,
        image_size: int = 32,
        nuisances: Mapping[str, float] | None = None,
        resident: bool | str = False,
        **common: Any,
    ) -> None:
        super().__init__(image_size=image_size, **common)
        self.resident = check_resident(resident)
        check_integer("dataset.train_images", train_images, minimum=1)
        check_integer("dataset.test_images", test_images, minimum=0)
        self.nuisances = _nuisances(nuisances or {})
        self.name, self.classes = "shapes", list(shapes.CLASSES)
        pool = torch.arange(train_images)
        self.split(pool, labeled=torch.ones_like(pool, dtype=torch.bool), num_test=test_images)
        total = train_images + test_images
        self.images = torch.zeros(total, self.channels, image_size, image_size, dtype=torch.uint8)
        self.labels = torch.full((total,), -1)
        used = self.used()
        self.images[used], self.labels[used] = self.draw(used)
        self.recipe = f"{train_images} {test_images} {image_size} {self.seed} {self.nuisances}"

    def draw(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Generate the images (n, 3, S, S) uint8 and labels (n,) at `positions`, with S = `image_size`.

        Images that `limit` excludes from all splits are also generated.
        """
        return shapes.draw(positions, seed=self.seed, size=self.image_size, nuisances=self.nuisances)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the dataset in 16 hex digits, independent of `limit`."""
        # The fingerprint includes some images, so that it changes if the code that draws images changes.
        images, _ = self.draw(torch.arange(min(len(self), 64)))
        return digest((self.recipe.encode(), images.numpy().tobytes()))

    def records(self, *, contents: bool = False, on_progress: ProgressCallback | None = None) -> Records:
        """Return a single record for the whole dataset, because the dataset has no files.

        The hash of the contents in this record is the fingerprint of the dataset.
        """
        return make_records(
            [self.name.encode()], np.zeros(1, np.int64), contents=np.array([int(self.fingerprint, 16) | 1], np.uint64)
        )


class TorchvisionSet(Source):
    """CIFAR10, CIFAR100, STL10 or SVHN with the official test split, in memory.

    Args:
        name: "CIFAR10", "CIFAR100", "STL10" or "SVHN".
        root: the folder of the dataset's files. Downloaded files are written there.
        download: whether to download missing files.
        unlabeled: whether to add the 100,000 unlabeled images of STL10 to the training pool. It must be False for the
            other datasets.
        memory_gb: the largest size of the pixels in GB (10**9 bytes). Reading the files takes twice the memory of the
            pixels.
        resident: whether the training images are copied to the GPU once: True, False or "auto".
        common: the arguments of `Source`.

    Raises ValueError if a value is invalid, if the pixels exceed `memory_gb`, or if files are damaged. If files are
    missing, raises ValueError if the download fails or `download` is False.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str | os.PathLike[str],
        download: bool = True,
        unlabeled: bool = False,
        memory_gb: float = 4.0,
        resident: bool | str = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.resident = check_resident(resident)
        from sslcli.data.sources import vision

        parts = vision.read_parts(name, root, download=download, unlabeled=unlabeled, memory_gb=memory_gb)
        self.name, self.classes = name.lower(), parts.classes
        self.images = torch.from_numpy(np.concatenate(parts.pixels))
        self.labels = torch.from_numpy(np.concatenate(parts.labels)).long()
        pool = torch.arange(len(self.images) - parts.num_test)
        self.split(pool, labeled=self.labels[: len(pool)] >= 0, num_test=parts.num_test)


def check_flag(name: str, value: bool) -> bool:
    """Return `value`. Raises ValueError unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"dataset.{name} is {value!r}, but it must be true or false")
    return value


def check_resident(value: bool | str) -> bool | str:
    """Return `value`. Raises ValueError unless `value` is a boolean or "auto"."""
    if not (isinstance(value, bool) or value == "auto"):
        raise ValueError(f"dataset.resident is {value!r}, but it must be auto, true or false")
    return value


def _nuisances(strengths: Mapping[str, float]) -> shapes.Nuisances:
    known = list(shapes.Nuisances.__dataclass_fields__)
    for key, value in strengths.items():
        if key not in known:
            raise ValueError(f"dataset.nuisances has the unknown key {key!r}: the known keys are {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"dataset.nuisances.{key} is {value!r}, but it must be a number from 0 to 1")
    return shapes.Nuisances(**strengths)
