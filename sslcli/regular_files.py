"""Open regular files and nothing else.

A FIFO among the images would block whoever opens it until somebody writes to it, a device may never end, and a signal
does not get through to a process that waits for either.
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
    """Open a regular file for reading bytes. Raises OSError for anything else, at once."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {KINDS.get(kind, 'something else')}, not a regular file", os.fspath(path))
    return open(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], *, most: int) -> bytes:
    """All of a regular file. Raises OSError for anything else, and for more than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most / 1e6:,.0f} MB", os.fspath(path))
    return content


def kind_of(path: Path) -> str:
    """What lies at a path, in words."""
    kind = stat.S_IFMT(path.stat().st_mode)
    return "a file" if kind == stat.S_IFREG else KINDS.get(kind, "something else")


def check_regular(path: Path) -> None:
    """Raise OSError unless the path leads to a regular file that can be read."""
    open_regular(path).close()
