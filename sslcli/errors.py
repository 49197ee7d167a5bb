"""Exceptions and exit codes of the commands. The CLI maps each exception to a message and an exit code.

A plain `ValueError` that a constructor raises while a run is built also reports an invalid configuration.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence

PERMISSION_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)
DISK_ERRORS = (*PERMISSION_ERRORS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

EXIT_CONFIG = 2
EXIT_FAILED = 3
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130  # interrupted by Ctrl-C; no checkpoint was saved


class ConfigError(ValueError):
    """Invalid configuration or data. The command prints the message without a traceback; the exit code is 2."""


class TrainingFailed(RuntimeError):
    """Training cannot continue, for example after a NaN loss, a collapse or a full disk. The exit code is 3."""


class ProcessLost(TrainingFailed):
    """A data worker or another process of the run ended unexpectedly. The exit code is 3; a restart may succeed."""


class NotFinite(ValueError):
    """Raised for features that are NaN or infinite. Metrics of such features have no meaning."""


class Stopped(Exception):
    """The run saved a checkpoint and stopped. The exit code is 75; the same command resumes the run.

    Args:
        by_signal: True if a signal stopped the run, False if the time limit did.
    """

    def __init__(self, message: str, *, by_signal: bool) -> None:
        super().__init__(message)
        self.by_signal = by_signal


DEBUG = "SSLCLI_DEBUG"  # environment variable; 1 = print the traceback after each error message
_NOT_OF_THE_USER = ("sslcli", "torch", "torchvision", "hydra", "omegaconf", "numpy", "PIL", "yaml", "datasets", "timm")


def print_error(command: str, error: BaseException | str) -> None:
    """Print an error of `ssl-COMMAND` on one line of standard error.

    With SSLCLI_DEBUG=1, the traceback is printed after the message. Otherwise, if code of the user or of a plug-in
    raised the error, the message mentions SSLCLI_DEBUG.
    """
    hint = ""
    if isinstance(error, BaseException) and os.environ.get(DEBUG) != "1" and _raised_in_user_code(error):
        hint = f" ({DEBUG}=1 shows the traceback)"
    print(printable(f"ssl-{command}: {error}{hint}", keep="\n"), file=sys.stderr, flush=True)
    if isinstance(error, BaseException) and os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)


# Control characters, line separators, characters that change the writing direction, and surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, *, keep: str = "") -> str:
    """Return a value as text that is safe to print and to encode as UTF-8.

    Control characters become escapes: ESC becomes `\\x1b`. Without the escapes, a terminal would execute the commands
    that a file name contains. Python decodes each byte of a file name that is not UTF-8 to a surrogate. Such a
    surrogate also becomes an escape: the byte FF becomes `\\xff`.

    Args:
        text: the value.
        keep: characters that are not escaped, such as `"\\n"` for a message of several lines.
    """
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(text))


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


def _raised_in_user_code(error: BaseException) -> bool:
    """Return True if the traceback of the first cause of `error` contains code outside of sslcli and its libraries."""
    while error.__cause__ is not None:
        error = error.__cause__
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = {str(module).partition(".")[0] for module in modules}
    return bool(packages - {*_NOT_OF_THE_USER, *sys.stdlib_module_names, "__main__"})


def disk_failure(error: OSError, path: object, key: str) -> tuple[str, int] | None:
    """Return the message and exit code of a failed write, or None if the error is not a disk error.

    Args:
        path: path for the message if `error` has no file name.
        key: the configuration key of the output location.
    """
    if error.errno not in DISK_ERRORS:
        return None
    what = f"{error.filename or path} cannot be written ({error.strerror})"
    if error.errno in PERMISSION_ERRORS:
        return f"{what}: choose another {key}, or change its permissions", EXIT_CONFIG
    return f"{what}: free space or repair the disk, then run the same command again to resume", EXIT_FAILED


def is_disk_failure(error: OSError) -> bool:
    """Return True if a write failed because the disk is full or broken. Other settings do not help in this case."""
    return error.errno in DISK_ERRORS and error.errno not in PERMISSION_ERRORS


def nearest(name: object, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` with the known name closest to `name`, or "" if none is close. Ignore case."""
    from difflib import get_close_matches

    names = {option.lower(): option for option in known}
    found = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    return f" Did you mean {names[found[0]]!r}?" if found else ""


def check_keys(where: str, keys: Iterable[object], known: Sequence[str]) -> None:
    """Raise ValueError unless all keys are known.

    The message contains `where`, the unknown key, the closest known key, and the list of known keys.
    """
    for key in keys:
        if key not in known:
            raise ValueError(
                f"{where} has the unknown key {key!r}.{nearest(key, known)} Known keys: {', '.join(known)}"
            )


def check_integer(name: str, value: object, *, minimum: int, hint: str = "") -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`. True and False are rejected."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {minimum}{hint}")


def check_positive(**values: int) -> None:
    """Raise ValueError unless every named value is an integer of at least 1."""
    for name, value in values.items():
        check_integer(name, value, minimum=1)
