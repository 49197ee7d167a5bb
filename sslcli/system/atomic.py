"""Atomic file writes and checksums.

New content is written to a temporary file with a unique name next to the target. This file is then renamed to the
target, so any number of processes may write the same file simultaneously. If a writer is killed, the next writer in the
same folder removes its temporary file.
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

from sslcli.system.regular_files import open_regular

TEMPORARY = re.compile(r".+\.(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]{8}\.tmp", re.DOTALL)
ABANDONED = 86400.0  # seconds without a change after which a temporary file of another machine counts as abandoned


def sha256(path: Path) -> str:
    """Return the SHA-256 hex digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it has either the old or the new content."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write(path: Path, fill: Callable[[Path], object], *, durable: bool = True) -> None:
    """Replace a file atomically; `fill(temporary)` writes the new content.

    Args:
        path: file to replace.
        fill: function that writes to the given temporary path.
        durable: fsync the content before the rename; otherwise a machine crash may lose it.
    """
    with beside(path) as temporary:
        fill(temporary)
        if durable:
            synchronize(temporary)
        os.replace(temporary, path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a unique temporary path next to `path`; remove it after the block if it still exists."""
    temporary = temporary_name(path)
    remove_abandoned(path.parent)
    try:
        yield temporary
    finally:
        with suppress(OSError):  # do not hide an error of the block; the next writer removes the file
            if os.path.lexists(temporary):
                discard(temporary)


def temporary_name(path: Path) -> Path:
    """Return a unique path next to `path`; its name has machine and process ID of the writer, and ends in `.tmp`."""
    name = path.name[:40]  # at most 160 bytes; the limit of the whole name is 255
    return path.with_name(f"{name}.{machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


@cache
def machine() -> str:
    """Return an ID of this machine, boot and container: process IDs are unique only within these."""
    parts = [platform.node()]
    with suppress(OSError):  # only Linux has /proc
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


@cache
def remove_abandoned(folder: Path) -> None:
    """Remove temporary files of killed writers from a folder; each process does this only once per folder."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".tmp")]
    except OSError:  # the write itself reports the error
        return
    for name in names:
        with suppress(OSError):  # another writer has removed the file, or this process has no permission
            if is_abandoned(folder / name):
                discard(folder / name)


def is_abandoned(path: Path) -> bool:
    """Return True if a temporary file belongs to a writer that has ended."""
    match = TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    if match["machine"] == machine():
        return not is_alive(int(match["process"]))
    return time.time() - path.lstat().st_mtime > ABANDONED


def is_alive(process: int) -> bool:
    """Return True if a process with this ID exists on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process belongs to another user
        return True
    return True


def synchronize(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a file or folder if it exists. A folder is renamed first, so that no reader sees it partly deleted."""
    if path.is_dir() and not path.is_symlink():
        doomed = path if path.suffix == ".tmp" else temporary_name(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
