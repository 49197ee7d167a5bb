"""Reader of encoded images from the shards of a dataset. It caches the parts of shards (chunks) that are in use."""

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
from sslcli.data.shards.index import is_local, read_error
from sslcli.errors import ConfigError

CHUNK_LIMITS = 8_000_000, 256  # limits of a chunk of a tar archive: approximate number of bytes, and number of images
MAX_OPEN_FILES = 32  # maximum number of parquet files that a process keeps open
RETRY_DELAYS = (1.0, 4.0)  # seconds before a read over the network is retried

Integers = NDArray[np.int64]
T = TypeVar("T")


class ShardReader:
    """Reader of the images of indexed shards.

    An image is identified by its position: the images of the first shard have the positions 0, 1, ..., followed by
    those of the second shard, and so on.

    A chunk is a part of a shard that is fetched with one read:
    - In a parquet file, a chunk is a row group.
    - In a tar archive, a chunk is a part of about 8 MB with at most 256 images.

    Local tar archives are read image by image instead of in chunks.

    Args:
        shards: the shards, in the order of the positions.
        indices: the index of each shard.
    """

    def __init__(self, shards: Sequence[Shard], indices: Sequence[Index]) -> None:
        self.shards = list(shards)
        self.columns = [index.image for index in indices]
        self.ends = np.cumsum([len(index) for index in indices])  # end of each shard, in positions
        chunks = [chunk_lengths(index) for index in indices]
        self.chunk_ends = np.cumsum(np.concatenate(chunks))  # end of each chunk, in positions
        self.first_chunks = np.cumsum([0, *map(len, chunks[:-1])])  # first chunk of each shard
        # Indices of parquet files have no byte offsets of images. Zeros are used instead, so that `starts` has a value
        # per position.
        unknown = [np.zeros(len(index) - len(index.starts), np.int64) for index in indices]
        self.starts, self.sizes = (
            np.concatenate([part for pair in zip(known, unknown, strict=True) for part in pair])
            for known in ([index.starts for index in indices], [index.sizes for index in indices])
        )
        self.reads_singly = [is_local(shard) and shard.url.endswith(".tar") for shard in shards]
        self._states: dict[int, ReadState] = {}

    def shard_of(self, positions: Integers) -> Integers:
        """Return the number of the shard that contains the image at each of the `positions`."""
        return np.searchsorted(self.ends, positions, "right")

    def chunk_of(self, positions: Integers) -> Integers:
        """Return the number of the chunk (see `ShardReader`) that contains the image at each of the `positions`."""
        return np.searchsorted(self.chunk_ends, positions, "right")

    def locate(self, position: int) -> tuple[int, int]:
        """Return the number of the shard that contains the image at `position`, and the number of the image in it."""
        shard = int(self.shard_of(np.int64(position)))
        return shard, position - (int(self.ends[shard - 1]) if shard else 0)

    def hold(self, positions: Tensor) -> None:
        """Fetch the chunks that contain the images at `positions` (n,), and keep them until `release` is called.

        A chunk is a part of a shard that is fetched with one read. Images in local tar archives are read one by one, so
        nothing is fetched for them.
        """
        chunks, shards = self.chunk_of(positions.numpy()), self.shard_of(positions.numpy())
        for chunk, shard in zip(chunks.tolist(), shards.tolist(), strict=True):
            if chunk not in self.state.held and not self.reads_singly[shard]:
                self.state.held[chunk] = self.fetch(chunk)

    def release(self, positions: Tensor) -> None:
        """Free the memory of the chunks that contain the images at `positions` (n,).

        A chunk is a part of a shard that is fetched with one read.
        """
        for chunk in self.chunk_of(positions.numpy()).tolist():
            self.state.held.pop(chunk, None)

    def content(self, position: int) -> bytes:
        """Return the encoded image at `position`.

        Raises ConfigError if the shard cannot be read. For a parquet file, raises BadImage if the cell at `position`
        contains no image, or if the row group of this cell is damaged.
        """
        chunk, (shard, number) = int(self.chunk_of(np.int64(position))), self.locate(position)
        first = int(self.chunk_ends[chunk - 1]) if chunk else 0
        data = self.state.held.get(chunk)
        if self.shards[shard].url.endswith(".tar"):
            if data is None:
                return self.read_bytes(shard, position, position)
            start = int(self.starts[position] - self.starts[first])
            return bytes(data[start : start + int(self.sizes[position])])
        if data is None:
            data = self.state.cached_chunk(chunk, self.fetch)
        path = f"{self.shards[shard].url}[{number}]"
        if isinstance(data, str):
            raise BadImage(path, data)
        return image_in_cell(data[position - first].as_py(), path)

    def fetch(self, chunk: int) -> Any:
        """Return a chunk: bytes of a tar archive, or the image column of a row group of a parquet file.

        If a row group cannot be decoded, an error text is returned instead.

        chunk: number of the chunk; the chunks of all shards are numbered together.
        """
        first, last = int(self.chunk_ends[chunk - 1]) if chunk else 0, int(self.chunk_ends[chunk]) - 1
        number, _ = self.locate(first)
        shard, state = self.shards[number], self.state
        if shard.url.endswith(".tar"):
            return self.read_bytes(number, first, last)
        group = chunk - int(self.first_chunks[number])
        return read_with_retries(shard, lambda: state.read_group(shard, group, self.columns[number]))

    def read_bytes(self, number: int, first: int, last: int) -> bytes:
        """Return a part of a tar archive, from the first byte of one image to the last byte of the same or a later one.

        number: number of the shard.
        first, last: positions of the two images.
        """
        shard = self.shards[number]
        start, end = int(self.starts[first]), int(self.starts[last] + self.sizes[last])
        state = self.state

        def read() -> bytes:
            system, path = state.file_system(shard)
            content: bytes = system.cat_file(path, start=start, end=end)
            if len(content) < end - start:
                raise OSError("it is shorter than when it was indexed")
            return content

        return read_with_retries(shard, read)

    @property
    def state(self) -> ReadState:
        """Chunks in memory, open files and file systems of this process.

        A forked process gets a new state, because processes must not share open files.
        """
        if os.getpid() not in self._states:
            self._states = {os.getpid(): ReadState()}
        return self._states[os.getpid()]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_states": {}}


class ReadState:
    """State of one process: the chunks in memory, the open parquet files, and the file systems.

    A chunk is a part of a shard that is fetched with one read.

    Attributes:
        held: the fetched chunks by number, see `ShardReader.hold`.
        last: number and content of the chunk that `cached_chunk` returned last.
        files: the open parquet files by address, in the order of their last use.
        systems: file system and path of each shard by address.
    """

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.last: tuple[int, Any] = (-1, None)
        self.files: OrderedDict[str, Any] = OrderedDict()
        self.systems: dict[str, tuple[Any, str]] = {}

    def file_system(self, shard: Shard) -> tuple[Any, str]:
        """Return the file system of a shard, and the path of the shard in this file system."""
        if shard.url not in self.systems:
            self.systems[shard.url] = fsspec.core.url_to_fs(shard.url)
        return self.systems[shard.url]

    def cached_chunk(self, chunk: int, fetch: Callable[[int], Any]) -> Any:
        """Return the result of `fetch(chunk)`. Keep it in memory until another chunk is requested.

        This method is used for chunks that `ShardReader.hold` did not fetch. Evaluation reads in order, so most
        requests are for the same chunk as the request before.

        chunk: number of the chunk, which is a part of a shard that is fetched with one read.
        """
        if self.last[0] != chunk:
            self.last = (chunk, fetch(chunk))
        return self.last[1]

    def read_group(self, shard: Shard, group: int, column: str) -> Any:
        """Return the image column of one row group of a parquet file, or an error text if it cannot be decoded.

        group: number of the row group in the file.
        column: name of the image column.
        """
        parquet = self.files.pop(shard.url, None)
        if parquet is None:
            parquet = open_parquet(fsspec.open(shard.url, "rb", cache_type="none").open(), shard)
        try:
            result = parquet.read_row_group(group, columns=[column], use_threads=False).column(0)
        except (ValueError, OSError) as error:
            # If the data is invalid, pyarrow raises a plain OSError without errno. If the file system fails, the error
            # has an errno.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            result = f"row group {group} is damaged: {str(error).splitlines()[0]}"
        self.files[shard.url] = parquet
        if len(self.files) > MAX_OPEN_FILES:
            self.files.popitem(last=False)[1].close(force=True)
        return result


def chunk_lengths(index: Index) -> Integers:
    """Return the number of images of each chunk of a shard. A chunk is a part of a shard that is fetched with one read.

    The order of the images in an epoch depends on the chunks. Therefore local and remote shards have the same chunks.
    """
    if len(index.groups):
        return index.groups
    size, images = CHUNK_LIMITS
    cells = np.stack([index.starts // size, np.arange(len(index)) // images])
    return np.unique(cells, axis=1, return_counts=True)[1].astype(np.int64)


def image_in_cell(value: Any, path: str) -> bytes:
    """Return the encoded image in a cell of the image column of a parquet file.

    value: content of the cell: bytes, or a mapping with the key "bytes".
    path: text that names the image, for the error.

    Raises BadImage if the cell contains no image.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    raise BadImage(path, "the cell is empty" if value is None else "the cell does not contain the bytes of an image")


def read_with_retries(shard: Shard, read: Callable[[], T]) -> T:
    """Return the result of `read()`. If the shard is remote, call `read` again after an error, up to two times.

    Raises ConfigError if all attempts fail.
    """
    for delay in (*(() if is_local(shard) else RETRY_DELAYS), None):
        try:
            return read()
        except ConfigError:
            raise
        except Exception as error:  # fsspec's file systems raise exceptions of many types
            if delay is None:
                raise read_error(shard, error) from error
            time.sleep(delay)
    raise AssertionError
