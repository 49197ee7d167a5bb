"""Functions that open regular files and reject FIFOs, sockets, devices and folders.

Opening a FIFO blocks until another process writes to the FIFO. Reading a device may never end. A process that is
blocked in such a call does not react to signals.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes. Raises OSError immediately if `path` is not a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {KINDS.get(kind, 'something else')}, not a regular file", os.fspath(path))
    return open(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], *, most: int) -> bytes:
    """Return the content of a regular file.

    Raises OSError if `path` is not a regular file, or if the file has more than `most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most / 1e6:,.0f} MB", os.fspath(path))
    return content


def kind_of(path: Path) -> str:
    """Return the type of the file at `path` as a phrase for messages, such as "a file" or "a folder"."""
    kind = stat.S_IFMT(path.stat().st_mode)
    return "a file" if kind == stat.S_IFREG else KINDS.get(kind, "something else")
