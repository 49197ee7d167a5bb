"""File locks (flock).

The operating system releases a lock when all processes that hold the lock have exited, even if they were killed.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

# Errors of flock on file systems without locks (e.g. Lustre without the mount option `flock`).
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def lock(path: Path) -> IO[str] | None:
    """Lock a file and return the open file. Return None if another process holds the lock.

    The file is created if it does not exist. The lock is held until this process and all processes that inherited the
    open file have closed the file. On a file system without locks, every call succeeds.
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
    """Wait for the lock of a file. Hold the lock within the `with` block. The file is created if it does not exist."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


@cache
def can_lock(folder: Path) -> bool:
    """Return True if the file system of a folder supports locks.

    If the folder has no file `table.lock`, this function creates one.
    """
    with (folder / "table.lock").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return True
