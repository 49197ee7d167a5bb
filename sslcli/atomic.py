"""Files that are either the old or the new one, whole, whatever happens, and what tells whether they still are.

New content is written beside the file under a name that no other writer has, and renamed, so that any number of
processes may write the same file at once. What a killed writer leaves is removed by the next one in that folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from sslcli.regular_files import open_regular

TEMPORARY = re.compile(r".+\.(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]{8}\.tmp", re.DOTALL)
ABANDONED = 86400.0  # seconds without a change after which no writer is at work, wherever it ran


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def replace(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old or the new one, whole, whatever happens."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write(path: Path, fill: Callable[[Path], object], *, durable: bool = True) -> None:
    """Have `fill(temporary)` write the new content of a file, which then takes the place of the old one.

    Args:
        path: the file.
        fill: writes to the path it is given.
        durable: the content is on disk before the file gets its name; otherwise it can be lost with the machine.
    """
    with beside(path) as temporary:
        fill(temporary)
        if durable:
            synchronise(temporary)
        os.replace(temporary, path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path next to `path` that no other writer uses; what is still there after the block is removed."""
    temporary = temporary_name(path)
    clear(path.parent)
    try:
        yield temporary
    finally:
        with suppress(OSError):  # the error of the block counts, and the next writer removes it
            if os.path.lexists(temporary):
                discard(temporary)


def temporary_name(path: Path) -> Path:
    """A path next to `path` that no other writer uses. Its name tells who does, and ends in `.tmp`."""
    name = path.name[:40]  # at most 160 bytes, as the whole must not be longer than 255
    return path.with_name(f"{name}.{machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


@cache
def machine() -> str:
    """What tells apart machines, their starts, and containers, whose process ids are no one else's."""
    parts = [platform.node()]
    with suppress(OSError):  # there is no /proc outside of Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


@cache
def clear(folder: Path) -> None:
    """Remove what killed writers left in a folder, once in the life of this process."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".tmp")]
    except OSError:  # what is to be written there tells it better
        return
    for name in names:
        with suppress(OSError):  # another writer was faster, or it is not ours to remove
            if is_left(folder / name):
                discard(folder / name)


def is_left(path: Path) -> bool:
    """Whether a temporary file is one of a writer that is gone."""
    told = TEMPORARY.fullmatch(path.name)
    if told is None:
        return False
    if told["machine"] == machine():
        return not is_alive(int(told["process"]))
    return time.time() - path.lstat().st_mtime > ABANDONED


def is_alive(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def synchronise(path: Path) -> None:
    """Make sure a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a file or a folder, if it is there. A folder loses its name first, so that none is seen half deleted."""
    if path.is_dir() and not path.is_symlink():
        doomed = path if path.suffix == ".tmp" else temporary_name(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
