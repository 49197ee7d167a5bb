"""Decoded images kept in memory or in a file, so that each is decoded once and not once an epoch.

All images of a set have a place from the start, told by their sizes, and get there when they are first decoded. Nothing
is locked: whoever writes a place writes the same bytes, and marks it after that with their checksum, which every read
compares. So processes may share it, be killed at any moment, and find a damaged file: what is not there, or is not what
was written, is decoded again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from sslcli.data.bad_images import BadImage
from sslcli.data.decode import Encoded, Pixels, open_file
from sslcli.errors import ConfigError, nearest
from sslcli.system import atomic

KINDS = ("none", "ram", "disk")

_HEADER = 4096
_SAMPLE = 256
_GB = 10**9


def check(kind: str, gigabytes: float) -> None:
    """Raise ValueError unless these are values of `dataset.keep_decoded` and `dataset.keep_gb`."""
    if kind not in KINDS:
        near = nearest(kind, KINDS)
        raise ValueError(f"dataset.keep_decoded is {kind!r}, but it must be one of {', '.join(KINDS)}.{near}")
    if isinstance(gigabytes, bool) or not isinstance(gigabytes, (int, float)) or not 0 < gigabytes < float("inf"):
        raise ValueError(f"dataset.keep_gb is {gigabytes!r}, but it must be a number above 0")
    if kind != "none" and sys.platform != "linux":
        raise ValueError(f"dataset.keep_decoded is {kind!r}, but only Linux has what it needs: use none")


def folder(given: str | os.PathLike[str] | None) -> Path:
    """The folder of the files: the one given, or that of the user."""
    if given is not None:
        return Path(given).expanduser()
    from sslcli.data.shards.index import default_cache  # which imports what only shards need

    return default_cache() / "decoded"


class KeptPixels:
    """The decoded images of a set of files; made before the data workers, which share it.

    Args:
        path: of the image at a position.
        positions: (n,) int64, ascending: the images that have a place.
        folder: where the file is, or None for memory.
        name: of the set, the beginning of the file's name.
        gigabytes: refuse to keep more than this many GB (10**9 bytes).

    Raises ConfigError where the images do not fit, saying how much they take.
    """

    def __init__(
        self, path: Callable[[int], str], positions: Tensor, *, folder: Path | None, name: str, gigabytes: float
    ) -> None:
        self.path, self.positions = path, positions.numpy()
        self.file = None
        if folder is not None:
            digest = hashlib.sha256(b"\0".join(self.rows())).hexdigest()[:24]
            self.file = folder / f"{name}-{digest}.pixels"
        self.memory = self.reopen() if self.file is not None else None
        if self.memory is None:
            self.memory = self.make(gigabytes)
        count = len(self.positions)
        self.sizes = np.frombuffer(self.memory, np.int32, 2 * count, _HEADER).reshape(count, 2)
        self.marks = np.frombuffer(self.memory, np.uint64, count, _HEADER + 8 * count)
        self.ends = _HEADER + 16 * count + self.sizes.astype(np.int64).prod(1).cumsum() * 3

    def rows(self) -> Iterator[bytes]:
        """What tells the files: path, size and time of each."""
        for position in self.positions.tolist():
            path = self.path(position)
            try:
                found = os.stat(path)
                yield os.fsencode(path) + f"\0{found.st_size}\0{found.st_mtime_ns}".encode()
            except OSError:
                yield os.fsencode(path)

    def reopen(self) -> mmap.mmap | None:
        """The file of an earlier run; None where there is none, or one whose beginning is damaged."""
        assert self.file is not None
        if not self.file.exists():
            return None
        with suppress(OSError, ValueError), open(self.file, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
            sizes = memory[_HEADER : _HEADER + 8 * len(self.positions)]
            if memory[:_HEADER] == _header(sizes, len(memory)):
                return memory
        logging.getLogger("sslcli").warning("%s is damaged: it is made anew", self.file)
        self.file.unlink(missing_ok=True)
        return None

    def make(self, gigabytes: float) -> mmap.mmap:
        """An empty one."""
        count = len(self.positions)
        sample = self.positions[:: max(1, count // _SAMPLE)]
        likely = int(np.mean([3.0 * np.prod(self.size_of(position)) for position in sample.tolist()]) * count)
        # A million headers take minutes, which a set that is far too large need not wait for.
        if likely > 1.5 * gigabytes * _GB:
            raise _too_large(count, f"about {likely / _GB:.2f}", gigabytes)
        sizes = np.array([self.size_of(position) for position in self.positions.tolist()], np.int32)
        total = _HEADER + 16 * count + int(3 * sizes.astype(np.int64).prod(1).sum())
        if total > gigabytes * _GB:
            raise _too_large(count, f"{total / _GB:.2f}", gigabytes)
        head = _header(sizes.tobytes(), total) + sizes.tobytes()
        if self.file is None:
            free = _free_memory()
            if total > free:
                raise ConfigError(
                    f"dataset.keep_decoded=ram needs {total / _GB:.2f} GB for {count} images, but only "
                    f"{free / _GB:.2f} GB of memory are free: use disk or none, or lower dataset.limit"
                )
            memory = mmap.mmap(-1, total)
            memory[: len(head)] = head
            return memory
        return self.make_file(head, total)

    def make_file(self, head: bytes, total: int) -> mmap.mmap:
        """An empty file that has all of its room; if another process was faster, that of the other."""
        assert self.file is not None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic.beside(self.file) as new:
                with open(new, "w+b") as file:
                    # Writing to memory that a full disk cannot hold would kill the process.
                    os.posix_fallocate(file.fileno(), 0, total)
                    file.write(head)
                with suppress(FileExistsError):
                    os.link(new, self.file)
            with open(self.file, "r+b") as file:
                return mmap.mmap(file.fileno(), 0)
        except OSError as error:
            free = shutil.disk_usage(self.file.parent).free if self.file.parent.exists() else 0
            raise ConfigError(
                f"dataset.keep_decoded=disk needs {total / _GB:.2f} GB in {self.file.parent}, where {free / _GB:.2f} "
                f"GB are free ({error.strerror}): set dataset.keep_dir to another folder, or use none"
            ) from error

    def size_of(self, position: int) -> tuple[int, int]:
        """Width and height by the header of the file; 0 for one that cannot be read."""
        try:
            return open_file(self.path(position)).size
        except BadImage:
            return (0, 0)

    def open(self, position: int) -> Kept | Encoded:
        """The image at `position`: kept if it has a place, else its file."""
        at = int(np.searchsorted(self.positions, position))
        if at == len(self.positions) or self.positions[at] != position or not self.sizes[at].all():
            return open_file(self.path(position))
        return Kept(self, at)

    def place(self, at: int) -> memoryview:
        """Where the pixels of the image at number `at` are, (H, W, 3)."""
        assert self.memory is not None
        width, height = self.sizes[at].tolist()
        end = int(self.ends[at])
        return memoryview(self.memory)[end - 3 * width * height : end]


class Kept:
    """An image that is decoded once; see `Encoded`."""

    def __init__(self, kept: KeptPixels, at: int) -> None:
        self.kept, self.at = kept, at
        width, height = kept.sizes[at].tolist()
        self.size: tuple[int, int] = (width, height)

    def decode(self, divisor: int = 1) -> Image.Image | Pixels:
        """As `Encoded.decode`. An image that is decoded smaller is not kept: its pixels are others."""
        path = self.kept.path(int(self.kept.positions[self.at]))
        if divisor > 1:
            return open_file(path).decode(divisor)
        place, marks = self.kept.place(self.at), self.kept.marks
        # The lowest bit says that there is something.
        if marks[self.at] and int(marks[self.at]) == zlib.crc32(place) << 1 | 1:
            width, height = self.size
            return Pixels(np.frombuffer(place, np.uint8).reshape(height, width, 3))
        image = open_file(path).decode()
        if image.size == self.size:
            pixels = np.asarray(image).tobytes()
            place[:] = pixels
            marks[self.at] = zlib.crc32(pixels) << 1 | 1
        return image


def _header(sizes: bytes, total: int) -> bytes:
    """The first bytes of a file of `total` bytes for images of these sizes."""
    told = {"sslcli": "decoded images", "version": 1, "bytes": total, "sizes": hashlib.sha256(sizes).hexdigest()}
    return json.dumps(told).encode().ljust(_HEADER)


def _too_large(count: int, needed: str, gigabytes: float) -> ConfigError:
    return ConfigError(
        f"dataset.keep_decoded needs {needed} GB for {count} images, but dataset.keep_gb is {gigabytes:g}: raise it, "
        "lower dataset.limit, or use none"
    )


def _free_memory() -> int:
    """Bytes that this machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize
