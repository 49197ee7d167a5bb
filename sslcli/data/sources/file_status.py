"""Sizes, modification times and content hashes of many files. On slow file systems, files are read in parallel."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from sslcli.data.sources.records import ProgressCallback
from sslcli.system.regular_files import open_regular

UNREADABLE = 1  # placeholder for the hash of a file that cannot be read
_PROBES = 256  # number of files that are used to measure the speed of the file system
_SLOW_CALL = 1e-4  # seconds per file; if calls take longer (network file systems), threads are faster
_THREADS = 32
_FILES_PER_REPORT = 2048  # files between two calls of the progress callback
_FILES_PER_TASK = 16  # number of files that a thread processes per task
_READ_SIZE = 1 << 20  # bytes


def status_of(
    count: int, path: Callable[[int], str], on_progress: ProgressCallback | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the sizes in bytes and the modification times in nanoseconds of `count` files.

    Both values are -1 for a file for which `stat` fails.

    path: function that returns the path of file i, for i from 0 to `count` - 1.
    on_progress: callback that is called with the number of files done and `count`.
    """
    sizes, stamps = np.full(count, -1, np.int64), np.full(count, -1, np.int64)

    def read_status(number: int) -> None:
        try:
            status = os.stat(path(number))
        except (OSError, ValueError):
            return
        sizes[number], stamps[number] = status.st_size, status.st_mtime_ns

    _for_each(read_status, count, on_progress)
    return sizes, stamps


def hashes_of(
    count: int, path: Callable[[int], str], on_progress: ProgressCallback | None = None
) -> NDArray[np.uint64]:
    """Return the content hashes of `count` files. The hash of a file that cannot be read is `UNREADABLE`.

    path: function that returns the path of file i, for i from 0 to `count` - 1.
    on_progress: callback that is called with the number of files done and `count`.
    """
    hashes = np.zeros(count, np.uint64)

    def read(number: int) -> None:
        hashes[number] = _hash_of_file(path(number))

    _for_each(read, count, on_progress)
    return hashes


def hash_of(read: Callable[[], bytes]) -> int:
    """Call `read` until it returns b"", and return a hash of all bytes. The hash is never 0 or `UNREADABLE`."""
    state = hashlib.blake2b(digest_size=8)
    while part := read():
        state.update(part)
    return int.from_bytes(state.digest(), "little") | 2


def _hash_of_file(path: str) -> int:
    try:
        with open_regular(path) as file:
            return hash_of(lambda: file.read(_READ_SIZE))
    except (OSError, ValueError):
        return UNREADABLE


def _for_each(work: Callable[[int], None], count: int, on_progress: ProgressCallback | None) -> None:
    """Call `work` for every number in range(count). If the first calls are slow, use many threads for the others.

    If `on_progress` is not None, it is called after every `_FILES_PER_REPORT` further calls, with the number of
    completed calls and with `count`.
    """
    start = time.perf_counter()
    probes = min(count, _PROBES)
    for number in range(probes):
        work(number)
    is_slow = time.perf_counter() - start > _SLOW_CALL * probes

    def run(numbers: range) -> None:
        for number in numbers:
            work(number)

    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(probes, count, _FILES_PER_REPORT):
            part = range(first, min(first + _FILES_PER_REPORT, count))
            if is_slow:
                list(pool.map(run, (part[at : at + _FILES_PER_TASK] for at in range(0, len(part), _FILES_PER_TASK))))
            else:
                run(part)
            if on_progress is not None:
                on_progress(part.stop, count)
