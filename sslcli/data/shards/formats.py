"""Formats and indices of shards: tar archives in the layout of WebDataset, and parquet files.

    cats-0000.tar   a/001.jpg a/001.cls a/002.jpg a/002.cls ...   same name up to the first dot = files of one image
    cats-0000.parquet   a column of images and a column of labels, in row groups

Shards are read through fsspec, from a local disk or any address that fsspec supports. The index of a tar archive
contains the byte range of each image. The index of a parquet file contains the row groups. Therefore a process reads
only the parts of a shard that it needs.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sslcli.config.added import OLD_EXTENSIONS
from sslcli.data.image_formats import listed_extensions
from sslcli.data.sources.columns import AUTO, LABEL_NAMES, Column, columns_of, image_column, label_column
from sslcli.data.sources.labels import Value, plain_label
from sslcli.errors import ConfigError

SHARD_EXTENSIONS = (".tar", ".parquet")
_BLOCK = 512  # block size of a tar archive in bytes
Sample = dict[str, tuple[int, int]]  # one entry per file of an image: extension -> start and size in bytes


@dataclass(frozen=True)
class Shard:
    """A shard, which is one file of a dataset: its address, its size in bytes, and a stamp.

    The stamp is a string that changes when the file is rewritten.
    """

    url: str
    size: int
    stamp: str

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.url.rpartition("/")[2]

    @property
    def real_url(self) -> str:
        """The address. For a local file, the path with symbolic links resolved."""
        return self.url if "://" in self.url else os.path.realpath(self.url)


@dataclass(frozen=True)
class Index:
    """Index of one shard of n images.

    Attributes:
        labels: (n,) stored labels; None = unknown.
        classes: the class names; empty if the shard has no class names.
        starts, sizes: (n,) offset of the first byte and number of bytes of each image in a tar archive; empty for
            parquet.
        groups: (g,) number of rows in each row group of a parquet file; empty for tar.
        image: for parquet, the name of the image column; for tar, the file extension of the images.
    """

    labels: list[Value]
    image: str
    classes: list[str] = field(default_factory=list)
    starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    groups: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.labels)


def build_index(file: IO[bytes], shard: Shard, *, image: str, label: str | None) -> Index:
    """Read a shard and return its index.

    Args:
        file: the opened file of the shard.
        shard: the address of the shard; its extension determines the format.
        image: the image column of a parquet file, or the file extension of the images in a tar archive; "auto" detects
            it.
        label: the label column of a parquet file. For a tar archive, the file extension of the labels, or a field of
            the JSON files. "auto" detects it. None = no labels.

    Raises:
        ConfigError: the shard is truncated, damaged or empty, or lacks the requested column.
    """
    read = _index_tar if shard.url.endswith(".tar") else _index_parquet
    index = read(file, shard, image=image, label=label)
    if len(index) == 0:
        raise ConfigError(f"{shard.url} has no images: remove it")
    return index


def _index_tar(file: IO[bytes], shard: Shard, *, image: str, label: str | None) -> Index:
    labels: list[Value] = []
    spans, extension = [], image
    for key, sample in _samples(file, shard):
        where = f"{shard.url} ({key})"
        images = [name for name in sample if image in (AUTO, name) and is_image_extension(name)]
        if len(images) > 1:  # the common format is the image; a second file in a rare format may be a depth map
            images = [name for name in images if name.rpartition(".")[2] in OLD_EXTENSIONS] or images
        extension = images[0] if len(images) == 1 else image_column(_columns(sample, file), image, where=where)
        spans.append(sample[extension])
        labels.append(_label(sample, file, label, where=where))
    starts, sizes = np.array(spans, np.int64).reshape(-1, 2).T
    return Index(labels, extension, [], starts, sizes)


def _samples(file: IO[bytes], shard: Shard) -> Iterator[tuple[str, Sample]]:
    """Yield a pair for each image of a tar archive: the common name and the locations of the files of the image.

    The files of an image are the image file and files with other data, such as the label. They have the same name up to
    the first dot.

    Raises ConfigError if the archive is truncated or damaged.
    """
    previous, sample = "", Sample()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps all members in memory
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not (member.isfile() and stem and extension):
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if sample and (key != previous or extension.lower() in sample):
                    yield previous, sample
                    sample = Sample()
                previous = key
                sample[extension.lower()] = (member.offset_data, member.size)
            file.seek(tar.offset)
            end = file.read(_BLOCK)
    except (tarfile.TarError, EOFError) as error:
        raise _damaged_error(shard, str(error)) from error
    if len(end) < _BLOCK or any(end):  # tarfile does not check that the archive has its end marker
        raise _damaged_error(shard, "the end of the archive is missing")
    if sample:
        yield previous, sample


def is_image_extension(name: str) -> bool:
    """Return whether a file extension is that of an image, such as "jpg" or "left.jpg".

    In tar archives, an extension is the part of a file name after the first dot. Only its part after the last dot
    determines the result.
    """
    return name.rpartition(".")[2] in listed_extensions()


def _columns(sample: Sample, file: IO[bytes]) -> dict[str, Column]:
    """Describe the files of one image in a tar archive as columns of a table.

    The columns are used to detect which file contains the image, and which file or field contains the label.

    There is one column per file extension. `LABEL_NAMES` contains the extensions of label files. If the image has a
    JSON file but no file with one of these extensions, there is also one column per field of the JSON file.

    sample: the location of each file of the image in the archive `file`.
    """
    columns = {name: Column(image=is_image_extension(name)) for name in sample}
    if "json" in sample and not any(name in sample for name in LABEL_NAMES):
        columns |= {name: Column() for name in _read_json(sample, file) if name not in columns}
    return columns


def _label(sample: Sample, file: IO[bytes], wanted: str | None, *, where: str) -> Value:
    """Return the label of one image in a tar archive: the content of a file, or a field of the JSON file.

    Return None if the image has no label.

    sample: the location of each file of the image in the archive `file`.
    wanted: the extension of the label file, or the name of the field; "auto" detects it; None = no labels.
    where: name of the image, for error messages.
    """
    name = next((name for name in LABEL_NAMES if name in sample), None) if wanted == AUTO else wanted
    if name is None and wanted == AUTO and "json" in sample:
        name = label_column(_columns(sample, file), AUTO, where=where)
    if name is None:
        return None
    if name in sample:
        text = str(plain_label(_read(sample[name], file), where=f"{name} of {where}")).strip()
        return int(text) if re.fullmatch(r"-?\d+", text) else text
    fields = _read_json(sample, file) if "json" in sample else {}
    if name not in fields:
        label_column({**_columns(sample, file), **{key: Column() for key in fields}}, name, where=where)
    return plain_label(fields[name], where=f"{name} of {where}")


def _read(span: tuple[int, int], file: IO[bytes]) -> bytes:
    file.seek(span[0])
    return file.read(span[1])


def _read_json(sample: Sample, file: IO[bytes]) -> dict[str, Any]:
    try:
        fields = json.loads(_read(sample["json"], file))
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _index_parquet(file: IO[bytes], shard: Shard, *, image: str, label: str | None) -> Index:
    with open_parquet(file, shard) as parquet:
        columns = columns_of(parquet.schema_arrow)
        image = image_column(columns, image, where=shard.url)
        label = label_column(columns, label, where=shard.url)
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        labels: list[Value] = [None] * sum(groups)
        if label is not None:
            values = parquet.read(columns=[label], use_threads=False).column(0).to_pylist()
            labels = [plain_label(value, where=f"column {label!r} of {shard.url}") for value in values]
    classes = [] if label is None else list(columns[label].classes)
    return Index(labels, image, classes, groups=np.array(groups, np.int64))


def open_parquet(file: IO[bytes], shard: Shard) -> Any:
    """Open the parquet file of a shard with pyarrow. `shard` names the file in error messages.

    Raises ConfigError if `file` is not a parquet file, or if pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"parquet files need the package pyarrow, which cannot be imported ({error}): pip install pyarrow"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_error(shard, str(error)) from error


def _damaged_error(shard: Shard, reason: str) -> ConfigError:
    return ConfigError(
        f"{shard.url} is truncated or damaged ({(reason or 'no reason given').splitlines()[0]}): download or write it "
        f"again, or remove it from dataset.path ({os.path.splitext(shard.name)[1]} shards must be complete)"
    )
