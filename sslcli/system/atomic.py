"""Atomic file writes and checksums.

New content is written to a temporary file with a unique name next to the target. The temporary file is then renamed to
the target. Therefore any number of processes may write the same file simultaneously. If a process is killed while it
writes, its temporary file stays in the folder. The next process that writes into the folder removes it.
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
from typing import BinaryIO

from sslcli.system.regular_files import open_regular

TEMPORARY = re.compile(r".+\.(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]{8}\.tmp", re.DOTALL)
OLD_TEMPORARY = re.compile(r"\..+\.\d{1,9}\.part", re.DOTALL)  # name of a temporary file in version 0.1
ABANDONED = 86400.0  # seconds; a temporary file of another machine is removed if it has not changed for this time


def sha256(path: Path) -> str:
    """Return the SHA-256 hex digest of a file."""
    with open_regular(path) as file:
        return digest_of(file)


def digest_of(file: BinaryIO) -> str:
    """Return the SHA-256 hex digest of an open file from its current position, read in chunks."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically. After a crash, the file has either the old or the new content, never a mixture."""
    write(path, lambda temporary: temporary.write_bytes(content))


def write(path: Path, fill: Callable[[Path], object], *, durable: bool = True) -> None:
    """Replace a file atomically.

    Args:
        path: file to replace.
        fill: function that writes the new content to the temporary path that it gets as its argument.
        durable: fsync the content before the rename. If False, a crash of the machine may lose the content.
    """
    with beside(path) as temporary:
        fill(temporary)
        if durable:
            synchronize(temporary)
        os.replace(temporary, path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a unique temporary path next to `path`.

    If a file or folder with the temporary path exists after the `with` block, it is removed.
    """
    temporary = temporary_name(path)
    remove_abandoned(path.parent)
    try:
        yield temporary
    finally:
        with suppress(OSError):  # do not hide an error of the `with` block; the next writer removes the file
            if os.path.lexists(temporary):
                discard(temporary)


def temporary_name(path: Path) -> Path:
    """Return a unique path next to `path`. It contains the machine and process ID of the writer, and ends in `.tmp`."""
    name = path.name[:40]  # at most 160 bytes; the whole name must not exceed 255 bytes
    return path.with_name(f"{name}.{machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


@cache
def machine() -> str:
    """Return an ID (8 hex digits) of this machine, boot and container.

    Process IDs are unique only within one boot of a machine and within one container.
    """
    parts = [platform.node()]
    with suppress(OSError):  # only Linux has /proc
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


@cache
def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder.

    Only the first call with a folder has an effect. Further calls with the same folder do nothing.
    """
    try:
        names = [name for name in os.listdir(folder) if name.endswith((".tmp", ".part"))]
    except OSError:  # the write that follows reports the error
        return
    for name in names:
        with suppress(OSError):  # another writer has removed the file, or this process has no permission
            if is_abandoned(folder / name):
                discard(folder / name)


def is_abandoned(path: Path) -> bool:
    """Return True if `path` is a temporary file of a process that has ended.

    Whether a process has ended is known only for processes of this machine. A temporary file of another machine, or of
    version 0.1, counts as abandoned if it has not changed for a day.
    """
    match = TEMPORARY.fullmatch(path.name)
    if match is None and OLD_TEMPORARY.fullmatch(path.name) is None:
        return False
    if match is not None and match["machine"] == machine():
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
    """Flush the content of a file or the entries of a folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a file or folder if it exists. A folder is first renamed, so that readers never find it partly deleted."""
    if path.is_dir() and not path.is_symlink():
        doomed = path if path.suffix == ".tmp" else temporary_name(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
