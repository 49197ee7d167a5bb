"""Exceptions and exit codes of the commands. The CLI maps each exception to a message and an exit code.

A plain `ValueError` from a constructor while a run is built also means an invalid configuration.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

DISK_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS)
DISK_ERRORS = (*DISK_REFUSALS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

EXIT_CONFIG = 2
EXIT_FAILED = 3
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130  # by Ctrl-C, with nothing saved


class ConfigError(ValueError):
    """Invalid configuration or data: exit code 2, message without traceback."""


class TrainingFailed(RuntimeError):
    """Training cannot continue (NaN loss, collapse, a dead worker, a full disk): exit code 3."""


class ProcessLost(TrainingFailed):
    """A data worker or another process of the run ended unexpectedly: exit code 3; a restart may succeed."""


class NotFinite(ValueError):
    """Features are NaN or infinite, so metrics of them are meaningless."""


class Stopped(Exception):
    """The run stopped with a checkpoint saved: exit code 75; run again to resume.

    Args:
        by_signal: True if stopped by a signal, False if by the time limit.
    """

    def __init__(self, message: str, *, by_signal: bool) -> None:
        super().__init__(message)
        self.by_signal = by_signal


def disk_failure(error: OSError, place: object, key: str) -> tuple[str, int] | None:
    """Return the message and exit code of a failed write, or None if the error is not a disk error.

    Args:
        place: what was written, if the error has no file name.
        key: the configuration key of the output location.
    """
    if error.errno not in DISK_ERRORS:
        return None
    what = f"{error.filename or place} cannot be written ({error.strerror})"
    if error.errno in DISK_REFUSALS:
        return f"{what}: choose another {key}, or change its permissions", EXIT_CONFIG
    return f"{what}: make room or mend the disk, then start the same command again to go on", EXIT_FAILED


def nearest(name: object, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, ignoring case, or ""."""
    from difflib import get_close_matches

    names = {option.lower(): option for option in known}
    found = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    return f" Did you mean {names[found[0]]!r}?" if found else ""


def check_keys(where: str, given: Iterable[object], known: Sequence[str]) -> None:
    """Raise ValueError unless all keys are known. The message has `where`, the key, the closest and all known keys."""
    for key in given:
        if key not in known:
            raise ValueError(
                f"{where} has the unknown key {key!r}.{nearest(key, known)} Known keys: {', '.join(known)}"
            )


def check_positive(**values: int) -> None:
    """Raise ValueError unless every named value is an integer of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, but it must be an integer of at least 1")
