"""Ask the file system for what it knows of many files, and read them whole, quickly on slow file systems as well."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from sslcli.data.sources.records import Tell
from sslcli.system.regular_files import open_regular

UNREADABLE = 1  # in place of the hash of a file that cannot be read
_TRIED = 256
_SLOW = 1e-4  # seconds a question takes where threads pay: network file systems
_THREADS = 32
_PART = 2048  # files after which the progress is told
_TASK = 16  # files that a thread takes at once
_PIECE = 1 << 20


def status_of(
    count: int, path: Callable[[int], str], tell: Tell | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sizes in bytes and modification times in nanoseconds of `count` files, -1 for what cannot be told."""
    sizes, stamps = np.full(count, -1, np.int64), np.full(count, -1, np.int64)

    def ask(number: int) -> None:
        try:
            found = os.stat(path(number))
        except (OSError, ValueError):
            return
        sizes[number], stamps[number] = found.st_size, found.st_mtime_ns

    _for_each(ask, count, tell)
    return sizes, stamps


def hashes_of(count: int, path: Callable[[int], str], tell: Tell | None = None) -> NDArray[np.uint64]:
    """Return a hash of the contents of `count` files; `UNREADABLE` for what is no file that can be read."""
    found = np.zeros(count, np.uint64)

    def read(number: int) -> None:
        found[number] = _hash_of(path(number))

    _for_each(read, count, tell)
    return found


def hash_of(pieces: Callable[[], bytes]) -> int:
    """Return a hash of what `pieces` gives until it gives nothing; neither 0 nor `UNREADABLE`."""
    state = hashlib.blake2b(digest_size=8)
    while piece := pieces():
        state.update(piece)
    return int.from_bytes(state.digest(), "little") | 2


def _hash_of(path: str) -> int:
    try:
        with open_regular(path) as file:
            return hash_of(lambda: file.read(_PIECE))
    except (OSError, ValueError):
        return UNREADABLE


def _for_each(work: Callable[[int], None], count: int, tell: Tell | None) -> None:
    """Call `work` for every number below `count`, from many threads where each call waits for long."""
    begun = time.perf_counter()
    tried = min(count, _TRIED)
    for number in range(tried):
        work(number)
    slow = time.perf_counter() - begun > _SLOW * tried

    def several(numbers: range) -> None:
        for number in numbers:
            work(number)

    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(tried, count, _PART):
            part = range(first, min(first + _PART, count))
            if slow:
                list(pool.map(several, (part[at : at + _TASK] for at in range(0, len(part), _TASK))))
            else:
                several(part)
            if tell is not None:
                tell(part.stop, count)
