"""The bytes of the images of a set of shards, by position; what is fetched at once is kept as long as it is wanted."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import fsspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sslcli.data.bad_images import BadImage
from sslcli.data.shards.formats import Index, Shard, open_parquet
from sslcli.data.shards.index import is_local, unreadable
from sslcli.errors import ConfigError

CHUNK = 8_000_000, 256  # bytes, about, and images of a tar archive that are fetched at once
OPEN = 32  # parquet files that a process keeps open
PAUSES = (1.0, 4.0)  # seconds before a read over the network is tried again

Integers = NDArray[np.int64]
T = TypeVar("T")


class ShardReader:
    """Reads images of shards of which the indices are known.

    A chunk is a row group of a parquet file, or up to 256 images within about 8 MB of a tar archive. It is fetched at
    once, except that the images of a tar archive on a local disk are read one by one.
    """

    def __init__(self, shards: Sequence[Shard], indices: Sequence[Index]) -> None:
        self.shards = list(shards)
        self.columns = [index.image for index in indices]
        self.ends = np.cumsum([len(index) for index in indices])  # of the shards, in positions
        chunks = [chunk_lengths(index) for index in indices]
        self.chunk_ends = np.cumsum(np.concatenate(chunks))  # in positions
        self.first_chunks = np.cumsum([0, *map(len, chunks[:-1])])  # of the shards
        # Parquet does not tell where an image begins; the zeros keep one position space.
        unknown = [np.zeros(len(index) - len(index.starts), np.int64) for index in indices]
        self.starts, self.sizes = (
            np.concatenate([part for pair in zip(known, unknown, strict=True) for part in pair])
            for known in ([index.starts for index in indices], [index.sizes for index in indices])
        )
        self.reads_singly = [is_local(shard) and shard.url.endswith(".tar") for shard in shards]
        self._open: dict[int, Open] = {}

    def shard_of(self, positions: Integers) -> Integers:
        """The number of the shard of each position."""
        return np.searchsorted(self.ends, positions, "right")

    def chunk_of(self, positions: Integers) -> Integers:
        """The number of the chunk of each position."""
        return np.searchsorted(self.chunk_ends, positions, "right")

    def place(self, position: int) -> tuple[int, int]:
        """The number of the shard, and of the image in it."""
        shard = int(self.shard_of(np.int64(position)))
        return shard, position - (int(self.ends[shard - 1]) if shard else 0)

    def hold(self, positions: Tensor) -> None:
        """Fetch the chunks of these (n,) positions; they stay until they are released."""
        chunks, shards = self.chunk_of(positions.numpy()), self.shard_of(positions.numpy())
        for chunk, shard in zip(chunks.tolist(), shards.tolist(), strict=True):
            if chunk not in self.open.held and not self.reads_singly[shard]:
                self.open.held[chunk] = self.fetch(chunk)

    def release(self, positions: Tensor) -> None:
        """Let go of the chunks of these (n,) positions."""
        for chunk in self.chunk_of(positions.numpy()).tolist():
            self.open.held.pop(chunk, None)

    def content(self, position: int) -> bytes:
        """The encoded image at `position`. Raises BadImage where there is none, ConfigError for a lost shard."""
        chunk, (shard, number) = int(self.chunk_of(np.int64(position))), self.place(position)
        first = int(self.chunk_ends[chunk - 1]) if chunk else 0
        held = self.open.held.get(chunk)
        if self.shards[shard].url.endswith(".tar"):
            if held is None:
                return self.bytes_of(shard, position, position)
            start = int(self.starts[position] - self.starts[first])
            return bytes(held[start : start + int(self.sizes[position])])
        if held is None:
            held = self.open.latest(chunk, self.fetch)
        path = f"{self.shards[shard].url}[{number}]"
        if isinstance(held, str):
            raise BadImage(path, held)
        return in_cell(held[position - first].as_py(), path)

    def fetch(self, chunk: int) -> Any:
        """A chunk: bytes of a tar archive, a column of Arrow, or the reason why it cannot be decoded."""
        first, last = int(self.chunk_ends[chunk - 1]) if chunk else 0, int(self.chunk_ends[chunk]) - 1
        number, _ = self.place(first)
        shard, opened = self.shards[number], self.open
        if shard.url.endswith(".tar"):
            return self.bytes_of(number, first, last)
        group = chunk - int(self.first_chunks[number])
        return patiently(shard, lambda: opened.group(shard, group, self.columns[number]))

    def bytes_of(self, number: int, first: int, last: int) -> bytes:
        """What a tar archive holds from the image at position `first` to the end of that at `last`."""
        shard = self.shards[number]
        start, end = int(self.starts[first]), int(self.starts[last] + self.sizes[last])
        opened = self.open

        def read() -> bytes:
            system, path = opened.system(shard)
            found: bytes = system.cat_file(path, start=start, end=end)
            if len(found) < end - start:
                raise OSError("it has become shorter than it was")
            return found

        return patiently(shard, read)

    @property
    def open(self) -> Open:
        """What this process has open: file positions must not be shared with the process that forked it."""
        if os.getpid() not in self._open:
            self._open = {os.getpid(): Open()}
        return self._open[os.getpid()]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class Open:
    """What one process has of the shards: the chunks that are held, the one that was read last, open parquet files."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.last: tuple[int, Any] = (-1, None)
        self.files: OrderedDict[str, Any] = OrderedDict()
        self.systems: dict[str, tuple[Any, str]] = {}

    def system(self, shard: Shard) -> tuple[Any, str]:
        """The file system of a shard, and its path there."""
        if shard.url not in self.systems:
            self.systems[shard.url] = fsspec.core.url_to_fs(shard.url)
        return self.systems[shard.url]

    def latest(self, chunk: int, fetch: Callable[[int], Any]) -> Any:
        """A chunk that is not held, kept until another one is asked for: evaluation goes through them in order."""
        if self.last[0] != chunk:
            self.last = (chunk, fetch(chunk))
        return self.last[1]

    def group(self, shard: Shard, group: int, column: str) -> Any:
        """The column of images of a row group, or why it cannot be decoded."""
        parquet = self.files.pop(shard.url, None)
        if parquet is None:
            parquet = open_parquet(fsspec.open(shard.url, "rb", cache_type="none").open(), shard)
        try:
            found = parquet.read_row_group(group, columns=[column], use_threads=False).column(0)
        except (ValueError, OSError) as error:
            # pyarrow raises plain OSError for bytes that make no sense; those of the system have a number.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            found = f"row group {group} is damaged: {str(error).splitlines()[0]}"
        self.files[shard.url] = parquet
        if len(self.files) > OPEN:
            self.files.popitem(last=False)[1].close(force=True)
        return found


def chunk_lengths(index: Index) -> Integers:
    """How many images each chunk of a shard has: the same wherever it lies, since the order of an epoch hangs on it."""
    if len(index.groups):
        return index.groups
    size, images = CHUNK
    cells = np.stack([index.starts // size, np.arange(len(index)) // images])
    return np.unique(cells, axis=1, return_counts=True)[1].astype(np.int64)


def in_cell(value: Any, path: str) -> bytes:
    """The encoded image in a cell of a column of images. Raises BadImage where there is none."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    raise BadImage(path, "the cell is empty" if value is None else "the cell does not hold the bytes of an image")


def patiently(shard: Shard, read: Callable[[], T]) -> T:
    """What `read` returns, tried again where a network lies between. Raises ConfigError where that does not help."""
    for pause in (*(() if is_local(shard) else PAUSES), None):
        try:
            return read()
        except ConfigError:
            raise
        except Exception as error:  # of whatever lies between us and the bytes
            if pause is None:
                raise unreadable(shard, error) from error
            time.sleep(pause)
    raise AssertionError
