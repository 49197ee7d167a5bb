"""Streaming datasets of shards, local or remote: parquet files and WebDataset tar archives.

The configuration is conf/dataset/hf_stream.yaml. The shards need not fit on the local disk. An index
(`sslcli.data.shards.index`) numbers the images of all shards. Therefore labels, splits and resuming work as for other
datasets. The layout of the images (`sslcli.data.order`) lets each worker of each process read its own shards
sequentially.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor

from sslcli.data import rng
from sslcli.data.bad_images import BadImage
from sslcli.data.decode import Encoded
from sslcli.data.order import Layout, layout_of
from sslcli.data.shards.formats import Index, Shard
from sslcli.data.shards.index import default_cache, find_shards, load_indices, read_error
from sslcli.data.shards.reader import ShardReader
from sslcli.data.sources.encoded import EncodedImages
from sslcli.data.sources.file_status import hash_of
from sslcli.data.sources.labels import Labels, as_labels
from sslcli.data.sources.records import UNKNOWN, ProgressCallback, Records, code_of, digest, label_codes, make_records
from sslcli.errors import ConfigError, check_positive


class HfStream(EncodedImages):
    """A dataset of shards.

    Args:
        path: one of the following, or a list of them: a shard; a folder of shards; a pattern such as
            "data/train-*.tar"; a range such as "train-{000..127}.tar"; an address such as
            "s3://bucket/train-*.parquet".
        test: the shards of the official test split, in the same form as `path`; None = no test split.
        image, label: for parquet files, the names of the image column and the label column. For tar archives, the file
            extensions of images and labels: the parts of the file names after the first dot. The label may also be a
            field of the JSON file of an image. "auto" detects the names. label=None: no labels.
        lanes: total number of shards that all processes and workers read in parallel, at least 1.
        buffer: total number of images in all shuffle buffers, at least 1.
        cache: the folder of the index files; None = a folder in the user's cache. The index file of a shard contains
            the label and the location of each image.
        common: the arguments of `EncodedImages`.

    The shards of `path` are sorted by address. The shards of `test` follow them. The images of all shards are numbered
    in this order. The number of an image is called its position.

    Raises ConfigError if a shard is missing, cannot be read, is damaged, or lacks a column.
    """

    def __init__(
        self,
        *,
        path: str | os.PathLike[str] | list[str],
        test: str | os.PathLike[str] | list[str] | None = None,
        image: str = "auto",
        label: str | None = "auto",
        lanes: int = 16,
        buffer: int = 4096,
        cache: str | os.PathLike[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_positive(**{"dataset.lanes": lanes, "dataset.buffer": buffer})
        self.lanes, self.buffer = lanes, buffer
        pool = find_shards(path, key="dataset.path")
        test_shards = [] if test is None else find_shards(test, key="dataset.test")
        pool_files = {shard.real_url for shard in pool}
        for shard in test_shards:
            if shard.real_url in pool_files:
                raise ConfigError(f"{shard.url} is in dataset.path and in dataset.test: remove it from one of them")
        folder = default_cache() if cache is None else Path(cache).expanduser()
        indices = load_indices([*pool, *test_shards], folder, image=image, label=label)
        self.name = pool[0].name.partition(".")[0] if len(pool) == 1 else Path(pool[0].url).parent.name
        self.reader = ShardReader([*pool, *test_shards], indices)
        self.labels, self.classes = as_labels(labels_of([*pool, *test_shards], indices, num_pool=len(pool)))
        num_pool = sum(map(len, indices[: len(pool)]))
        hashes = image_hashes(pool, list(map(len, indices)))
        self.split(hashes, labeled=self.labels[:num_pool] >= 0, num_test=len(self.labels) - num_pool)

    @property
    def layout(self) -> Layout:
        """Location of the training images in the shards, from which the loader computes the order of reading.

        The entries of the layout are in ascending order of the positions of the images.
        """
        train = self.splits["train"].numpy()
        shard, chunk = (torch.from_numpy(of(train)) for of in (self.reader.shard_of, self.reader.chunk_of))
        return layout_of(shard, chunk, lanes=self.lanes, buffer=self.buffer)

    def hold(self, positions: Tensor) -> None:
        """Fetch the parts of shards (chunks) that contain the images at `positions` (n,).

        Keep them until `release` is called.
        """
        self.reader.hold(positions)

    def release(self, positions: Tensor) -> None:
        """Free the memory of the parts of shards (chunks) that contain the images at `positions` (n,)."""
        self.reader.release(positions)

    def open(self, position: int) -> Encoded:
        """Open the image with index `position` in the dataset.

        Raises BadImage if the image is invalid, and ConfigError if the shard cannot be read.
        """
        return Encoded(self.reader.content(position), self.path(position), pixel_format=self.pixel_format)

    def stored_size(self, position: int) -> tuple[int, int] | None:
        """Return width and height in pixels of the image at `position`.

        Return None if the image cannot be read, or if its shard is remote.
        """
        shard, _ = self.reader.locate(position)
        if "://" in self.reader.shards[shard].url:
            return None
        try:
            return self.open(position).size
        except (BadImage, ConfigError):
            return None

    def path(self, position: int) -> str:
        """Return a text with the address of the shard and the number of the image in this shard."""
        shard, number = self.reader.locate(position)
        return f"{self.reader.shards[shard].url}[{number}]"

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the dataset in 16 hex digits.

        The digits are the start of a sha256. The hash includes all labels, and the name, the size in bytes and the
        number of images of each shard.
        """
        counts = np.diff(self.reader.ends, prepend=0).tolist()
        rows = [repr((s.name, s.size, count)).encode() for s, count in zip(self.reader.shards, counts, strict=True)]
        return digest((*rows, repr(self.classes).encode(), self.labels.numpy().tobytes()))

    def records(self, *, contents: bool = False, on_progress: ProgressCallback | None = None) -> Records:
        """Return one record per shard, with which a resumed run detects changed shards.

        The label of a record is a hash of the labels of all images in the shard.

        contents: whether to hash the contents of the shards.
        on_progress: callback that reports the progress of long calls.
        """
        shards, ends = self.reader.shards, self.reader.ends.tolist()
        codes = label_codes(self.labels, self.classes)
        labels = [code_of(codes[a:b].tobytes()) for a, b in zip([0, *ends], ends, strict=False)]
        hashes = np.full(len(shards), UNKNOWN, np.uint64)
        if contents:
            for number, shard in enumerate(shards):
                hashes[number] = hash_of_shard(shard)
                if on_progress is not None:
                    on_progress(number + 1, len(shards))
        return make_records(
            (shard.name.encode("utf-8", "surrogateescape") for shard in shards),
            np.array(labels, np.int64),
            sizes=np.array([shard.size for shard in shards], np.int64),
            stamps=np.array([code_of(shard.stamp.encode()) if shard.stamp else 0 for shard in shards], np.int64),
            contents=hashes,
            unit="shards",
        )


def labels_of(shards: Sequence[Shard], indices: Sequence[Index], *, num_pool: int) -> list[Labels]:
    """Return the labels of each shard. Warn if some shards have labels and other shards have no labels.

    num_pool: number of shards for training and validation. The shards after them are the official test split.
    """
    without = [s.url for s, index in zip(shards, indices, strict=True) if all(v is None for v in index.labels)]
    if 0 < len(without) < len(shards):
        warnings.warn(
            f"{len(without)} of {len(shards)} shards have no labels, so their images count as unlabeled: "
            f"{', '.join(without[:3])}{', ...' if len(without) > 3 else ''}",
            stacklevel=2,
        )
    return [
        Labels(index.labels, index.classes, f"the label of {shard.url}", is_test=number >= num_pool)
        for number, (shard, index) in enumerate(zip(shards, indices, strict=True))
    ]


def hash_of_shard(shard: Shard) -> int:
    """Return a hash of all bytes of a shard. Raises ConfigError if the shard cannot be read."""
    try:
        with fsspec.open(shard.url, "rb") as file:
            return hash_of(lambda: file.read(1 << 20))
    except Exception as error:  # fsspec's file systems raise exceptions of many types
        raise read_error(shard, error) from error


def image_hashes(shards: Sequence[Shard], lengths: Sequence[int]) -> Tensor:
    """Return one hash per image. It is computed from the name of the shard and the number of the image in the shard.

    The hash does not depend on the folder of the shard. If several shards have the same name, a counter distinguishes
    them.

    lengths: number of images of each shard.
    """
    counts: Counter[str] = Counter()
    parts = []
    for shard, length in zip(shards, lengths, strict=False):
        name = f"{shard.name} {counts[shard.name]}"
        counts[shard.name] += 1
        key = int.from_bytes(
            hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little", signed=True
        )
        parts.append(rng.mix(key, torch.arange(length)))
    return torch.cat(parts)
