"""Locks of files, which end with the processes that hold them, however these end."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

# What flock says on file systems without locks, such as Lustre mounted without them.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def lock(path: Path) -> IO[str] | None:
    """Take the lock of a file, made where needed; None while somebody else has it.

    It is held until the file is closed, here and in processes that inherited it. A file system without locks grants
    every one.
    """
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            return None
    return file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, made where needed, for the time of a block, once it is free."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


@cache
def can_lock(folder: Path) -> bool:
    """Whether files in a folder can be locked."""
    with (folder / "table.lock").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return True
