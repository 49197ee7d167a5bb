"""What a command may end with besides success. The CLI turns each into a message and an exit code.

Plain `ValueError` from a constructor also means "the user's configuration is wrong" while a run is being built.
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
    """The user's configuration or data is wrong: exit code 2, message only."""


class TrainingFailed(RuntimeError):
    """Training cannot go on (not-a-number loss, collapse, a dead worker, a full disk): exit code 3."""


class ProcessLost(TrainingFailed):
    """A data worker or another process of the run vanished: exit code 3, and worth another start."""


class NotFinite(ValueError):
    """Features are NaN or infinite: what is measured of them means nothing."""


class Stopped(Exception):
    """Stopped with a checkpoint saved: exit code 75, run again to go on.

    Args:
        by_signal: whether a signal was the reason, and not the time limit the user set.
    """

    def __init__(self, message: str, *, by_signal: bool) -> None:
        super().__init__(message)
        self.by_signal = by_signal


def disk_failure(error: OSError, place: object, key: str) -> tuple[str, int] | None:
    """What to tell of something that could not be written, and the exit code; None for an error that is no such thing.

    Args:
        place: what was written, where the error does not name it.
        key: the setting that says where it goes.
    """
    if error.errno not in DISK_ERRORS:
        return None
    what = f"{error.filename or place} cannot be written ({error.strerror})"
    if error.errno in DISK_REFUSALS:
        return f"{what}: choose another {key}, or change its permissions", EXIT_CONFIG
    return f"{what}: make room or mend the disk, then start the same command again to go on", EXIT_FAILED


def nearest(name: object, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, whatever the case of the letters, or nothing."""
    from difflib import get_close_matches

    names = {option.lower(): option for option in known}
    found = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    return f" Did you mean {names[found[0]]!r}?" if found else ""


def check_keys(where: str, given: Iterable[object], known: Sequence[str]) -> None:
    """Raise ValueError unless all keys are known; the message names `where`, the key, the nearest and all others."""
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
