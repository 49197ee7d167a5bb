"""Cache of decoded images in memory or in a file. With the cache, an image is decoded once instead of in every epoch.

The cache reserves a slot for the pixels of each image. The slot size is computed from the image size. After a process
has decoded an image, it writes the pixels into the slot, and then their checksum. Every read verifies the checksum. The
pixels of a slot do not match the checksum if they are damaged, or incomplete because a process was killed. If a slot is
empty or does not match its checksum, the image is decoded again. Therefore processes can share the cache without locks.
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
from sslcli.data.decode import Encoded, open_file
from sslcli.data.pixel_format import LEGACY, PixelFormat
from sslcli.data.pixels import Pixels
from sslcli.errors import ConfigError, nearest
from sslcli.system import atomic
from sslcli.system.memory import available_memory
from sslcli.system.stored import renamed, set_aside

KINDS = ("none", "ram", "disk")

_HEADER = 4096  # bytes of the header of a cache
_SAMPLE = 256  # number of images from which the size of a cache is estimated
_GB = 10**9


def check_cache_options(kind: str, gigabytes: float) -> None:
    """Raise ValueError unless `kind` is valid for `dataset.keep_decoded`, and `gigabytes` for `dataset.keep_gb`.

    Also raise ValueError if a cache is requested on a system other than Linux.
    """
    if kind not in KINDS:
        near = nearest(kind, KINDS)
        raise ValueError(f"dataset.keep_decoded is {kind!r}, but it must be one of {', '.join(KINDS)}.{near}")
    if isinstance(gigabytes, bool) or not isinstance(gigabytes, (int, float)) or not 0 < gigabytes < float("inf"):
        raise ValueError(f"dataset.keep_gb is {gigabytes!r}, but it must be a number above 0")
    if kind != "none" and sys.platform != "linux":
        raise ValueError(f"dataset.keep_decoded is {kind!r}, but it is supported on Linux only: use none")


def cache_folder(keep_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder of the cache files.

    keep_dir: the setting `dataset.keep_dir`. If it is a path, this path is returned. If it is None, a folder in the
        user's cache folder is returned.
    """
    if keep_dir is not None:
        return Path(keep_dir).expanduser()
    from sslcli.data.shards.index import default_cache  # imported here, because that module imports packages for shards

    return default_cache() / "decoded"


class DecodedCache:
    """Cache of the decoded images of a dataset of files.

    The data workers share the cache if it is created before they start.

    Args:
        path: function that returns the path of the image at a position in the dataset.
        positions: (n,) int64, the positions of the images to cache, in ascending order.
        folder: folder of the cache file, or None to cache in memory.
        name: name of the dataset; the name of the cache file begins with it.
        gigabytes: the largest size of the cache in GB (10**9 bytes).
        pixel_format: format of the decoded images. It is part of the name of the cache file.

    Raises ConfigError if the images need more than `gigabytes`, or more than the free memory or disk space.
    """

    def __init__(
        self,
        path: Callable[[int], str],
        positions: Tensor,
        *,
        folder: Path | None,
        name: str,
        gigabytes: float,
        pixel_format: PixelFormat = LEGACY,
    ) -> None:
        self.path, self.positions, self.pixel_format = path, positions.numpy(), pixel_format
        self.file = None
        if folder is not None:
            identities = [*self.file_identities(), *filter(None, [pixel_format.identity])]
            digest = hashlib.sha256(b"\0".join(identities)).hexdigest()[:24]
            self.file = folder / f"{name}-{digest}.pixels"
        self.memory = self.open_existing() if self.file is not None else None
        if self.memory is None:
            self.memory = self.create(gigabytes)
        count = len(self.positions)
        self.sizes = np.frombuffer(self.memory, np.int32, 2 * count, _HEADER).reshape(count, 2)
        self.checksums = np.frombuffer(self.memory, np.uint64, count, _HEADER + 8 * count)
        self.ends = _HEADER + 16 * count + self.sizes.astype(np.int64).prod(1).cumsum() * pixel_format.channels

    def file_identities(self) -> Iterator[bytes]:
        """Yield the path, size and modification time of the file of each image to cache, as bytes."""
        for position in self.positions.tolist():
            path = self.path(position)
            try:
                status = os.stat(path)
                yield os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}".encode()
            except OSError:
                yield os.fsencode(path)

    def open_existing(self) -> mmap.mmap | None:
        """Open the cache file of an earlier run. Return None if there is no such file or its header is damaged."""
        assert self.file is not None
        if not self.file.exists():
            return None
        with suppress(OSError, ValueError), open(self.file, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
            sizes = memory[_HEADER : _HEADER + 8 * len(self.positions)]
            if memory[:_HEADER] == _header(sizes, len(memory)):
                return memory
        aside = renamed(set_aside(self.file))
        logging.getLogger("sslcli").warning("%s is damaged%s: it is created again", self.file, aside)
        self.file.unlink(missing_ok=True)  # the file still exists here if renaming it failed
        return None

    def create(self, gigabytes: float) -> mmap.mmap:
        """Create an empty cache in memory or in a file.

        Raises ConfigError if the images need more than `gigabytes` GB or more than the free space.
        """
        count = len(self.positions)
        sample = self.positions[:: max(1, count // _SAMPLE)]
        channels = self.pixel_format.channels
        mean_pixels = np.mean([float(np.prod(self.size_of(position))) for position in sample.tolist()])
        estimate = int(channels * mean_pixels * count)
        # Reading the headers of a million images takes minutes. Therefore a dataset that is far too large is rejected
        # after a part of the headers was read.
        if estimate > 1.5 * gigabytes * _GB:
            raise _too_large_error(count, f"about {estimate / _GB:.2f}", gigabytes)
        sizes = np.array([self.size_of(position) for position in self.positions.tolist()], np.int32)
        total = _HEADER + 16 * count + int(channels * sizes.astype(np.int64).prod(1).sum())
        if total > gigabytes * _GB:
            raise _too_large_error(count, f"{total / _GB:.2f}", gigabytes)
        header = _header(sizes.tobytes(), total) + sizes.tobytes()
        if self.file is None:
            free = available_memory()
            if total > free:
                raise ConfigError(
                    f"dataset.keep_decoded=ram needs {total / _GB:.2f} GB for {count} images, but only "
                    f"{free / _GB:.2f} GB of memory are free: use disk or none, or lower dataset.limit"
                )
            memory = mmap.mmap(-1, total)
            memory[: len(header)] = header
            return memory
        return self.create_file(header, total)

    def create_file(self, header: bytes, total: int) -> mmap.mmap:
        """Create a cache file with one empty slot per image, allocate all of its space, and map it into memory.

        If another process has created the file in the meantime, the file of that process is mapped instead.

        header: the first bytes of the file.
        total: size of the file in bytes.
        """
        assert self.file is not None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic.beside(self.file) as new:
                with open(new, "w+b") as file:
                    # Writing to a mapped file on a full disk would kill the process, so the space is allocated first.
                    os.posix_fallocate(file.fileno(), 0, total)
                    file.write(header)
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
        """Return width and height of the image with index `position`, from the header of its file.

        Return (0, 0) if the file cannot be read.
        """
        try:
            return self.open_file(position).size
        except BadImage:
            return (0, 0)

    def open(self, position: int) -> CachedImage | Encoded:
        """Open the image at `position`. Return a `CachedImage` if the cache has a slot for it, else open its file."""
        slot = int(np.searchsorted(self.positions, position))
        if slot == len(self.positions) or self.positions[slot] != position or not self.sizes[slot].all():
            return self.open_file(position)
        return CachedImage(self, slot)

    def open_file(self, position: int) -> Encoded:
        """Open the file of the image at `position`. Raises BadImage if it cannot be read."""
        return open_file(self.path(position), pixel_format=self.pixel_format)

    def pixels(self, slot: int) -> memoryview:
        """Return a writable view of the pixels (H * W * C bytes) of the image with index `slot` in the cache."""
        assert self.memory is not None
        width, height = self.sizes[slot].tolist()
        end = int(self.ends[slot])
        return memoryview(self.memory)[end - self.pixel_format.channels * width * height : end]


class CachedImage:
    """An opened image that is decoded once and then read from the cache. It has the interface of `Encoded`.

    Args:
        cache: the cache with the pixels.
        slot: index of the image among the images of the cache.
    """

    def __init__(self, cache: DecodedCache, slot: int) -> None:
        self.cache, self.slot = cache, slot
        width, height = cache.sizes[slot].tolist()
        self.size: tuple[int, int] = (width, height)

    def decode(self, divisor: int = 1) -> Image.Image | Pixels:
        """Return the pixels that `Encoded.decode` returns, from the cache if possible.

        With a divisor above 1, a JPEG is decoded at 1/divisor of its size. The cache contains only images at full size,
        so it is not used in this case.
        """
        position = int(self.cache.positions[self.slot])
        if divisor > 1:
            return self.cache.open_file(position).decode(divisor)
        stored, checksums = self.cache.pixels(self.slot), self.cache.checksums
        # 0 marks an empty slot. The lowest bit of a stored checksum is 1, so the checksum of a filled slot is never 0.
        if checksums[self.slot] and int(checksums[self.slot]) == zlib.crc32(stored) << 1 | 1:
            width, height = self.size
            return Pixels(np.frombuffer(stored, np.uint8).reshape(height, width, -1))
        image = self.cache.open_file(position).decode()
        if image.size == self.size:
            pixels = np.asarray(image).tobytes()
            stored[:] = pixels
            checksums[self.slot] = zlib.crc32(pixels) << 1 | 1
        return image


def _header(sizes: bytes, total: int) -> bytes:
    """Return the header of a cache of `total` bytes. `sizes` holds width and height of each image as int32 bytes."""
    content = {"sslcli": "decoded images", "version": 1, "bytes": total, "sizes": hashlib.sha256(sizes).hexdigest()}
    return json.dumps(content).encode().ljust(_HEADER)


def _too_large_error(count: int, needed: str, gigabytes: float) -> ConfigError:
    return ConfigError(
        f"dataset.keep_decoded needs {needed} GB for {count} images, but dataset.keep_gb is {gigabytes:g}: increase "
        "dataset.keep_gb, lower dataset.limit, or use none"
    )
