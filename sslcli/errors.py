"""Exceptions and exit codes of the commands.

If one of these exceptions is raised, the command prints its message and exits with the code of its class. A plain
`ValueError` that a constructor raises while a run is built is reported like a ConfigError.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType

PERMISSION_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)
DISK_ERRORS = (*PERMISSION_ERRORS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

EXIT_BUG = 1  # unexpected exception in sslcli or in one of its libraries
EXIT_CONFIG = 2
EXIT_FAILED = 3
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130  # interrupted by Ctrl-C; no checkpoint was saved


class ConfigError(ValueError):
    """Invalid configuration or data. The command prints the message without a traceback; the exit code is 2."""


class UserCodeError(ConfigError):
    """User code (a user's own class, or a plug-in) raised an unexpected exception. The message has its traceback."""


class TrainingFailed(RuntimeError):
    """Training cannot continue, for example after a NaN loss, a collapse or a full disk. The exit code is 3."""


class ProcessLost(TrainingFailed):
    """A data worker or another process of the run ended unexpectedly. The exit code is 3; a restart may succeed."""


class NotFinite(ValueError):
    """Raised if features contain NaN or infinite values. Metrics of such features would have no meaning."""


class Stopped(Exception):
    """The run saved a checkpoint and stopped before its end. The exit code is 75; the same command resumes the run.

    Args:
        by_signal: True if a signal stopped the run, False if the time limit `train.max_time` stopped it.
    """

    def __init__(self, message: str, *, by_signal: bool) -> None:
        super().__init__(message)
        self.by_signal = by_signal


DEBUG = "SSLCLI_DEBUG"  # environment variable; 1 = print the traceback after each error message
BUG = "this is a bug in sslcli: report it with the text above"
# Top-level packages of sslcli, of its requirements in setup.cfg, and of the libraries that these requirements use. Code
# outside of these packages and of the standard library is code of the user.
LIBRARIES = (
    "sslcli",
    "torch",
    "torchvision",
    "torchgen",
    "functorch",
    "hydra",
    "hydra_plugins",
    "omegaconf",
    "antlr4",
    "yaml",
    "tensorboard",
    "rich",
    "numpy",
    "PIL",
    "simplejpeg",
    "tifffile",
    "imagecodecs",
    "pillow_heif",
    "timm",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "datasets",
    "huggingface_hub",
    "pyarrow",
    "pandas",
    "fsspec",
    "safetensors",
    "scipy",
    "submitit",
    "joblib",
    "ray",
    "optuna",
    "triton",
)


def print_error(command: str, error: BaseException | str) -> None:
    """Print `ssl-COMMAND: ERROR` to standard error.

    If the environment variable SSLCLI_DEBUG is 1, the traceback of an exception is printed after the message.
    Otherwise, if user code raised the exception, a hint about SSLCLI_DEBUG is added to the message. A UserCodeError
    gets no hint, because its message already contains the traceback.

    Args:
        command: train, eval, embed or export.
        error: exception, or message.
    """
    hint = ""
    shows_traceback = isinstance(error, UserCodeError) or os.environ.get(DEBUG) == "1"
    if isinstance(error, BaseException) and not shows_traceback and _user_part(error) is not None:
        hint = f" ({DEBUG}=1 shows the traceback)"
    print(printable(f"ssl-{command}: {error}{hint}", keep="\n"), file=sys.stderr, flush=True)
    if isinstance(error, BaseException) and os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)


# Control characters, line separators, characters that change the writing direction, and surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, *, keep: str = "") -> str:
    """Return a value as text that is safe to print and to encode as UTF-8.

    Control characters, for example in a file name, are replaced by escapes, because a terminal would execute them: ESC
    becomes `\\x1b`. If a file name contains bytes that are not valid UTF-8, Python decodes each of these bytes to a
    surrogate. Such a surrogate is also replaced by an escape: the byte FF becomes `\\xff`.

    Args:
        text: the value.
        keep: characters that are not escaped, such as `"\\n"` for a message of several lines.
    """
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(text))


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


@contextmanager
def user_code(
    action: str,
    *,
    explain: Callable[[BaseException], str] | None = None,
    passes: Callable[[BaseException], bool] = lambda error: False,
) -> Iterator[None]:
    """Convert exceptions that user code raises in the `with` block to UserCodeError.

    User code is code outside of sslcli, its libraries and the standard library. A method of sslcli or torch also counts
    as user code if it runs on an instance of a user's class. The message of the UserCodeError names the user's class or
    function, and ends with the traceback of the user code.

    Exceptions of all other code are raised unchanged. Some exceptions are raised unchanged even if user code raises
    them: out-of-memory errors, errors caused by a full disk, and ConfigError, TrainingFailed and Stopped. The last
    three already have a message for users.

    Args:
        action: what the block does, for the message, as in "computing the loss".
        explain: function that returns the message for an exception. If it is given, exceptions of user code and of
            other code become a ConfigError with this message, and `action` is not used.
        passes: function that returns True for further exceptions that are always raised unchanged.
    """
    try:
        yield
    except (ConfigError, TrainingFailed, Stopped):
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error) or _is_full_disk(error) or passes(error):
            raise
        if explain is not None:
            raise with_traceback(explain(error), error) from error
        found = user_code_error(action, error)
        if found is None:
            raise
        raise found from error


def user_code_error(action: str, error: BaseException, *, owner: type | None = None) -> UserCodeError | None:
    """Return the UserCodeError for an exception, or None if no user code raised it.

    User code is code outside of sslcli, its libraries and the standard library. A method of sslcli or torch also counts
    as user code if it runs on an instance of a user's class.

    Args:
        action: what the code did when the exception was raised, as in "reading images".
        error: the exception.
        owner: class of the object that was used, or None. If the traceback contains no user code, but `owner` is a
            class of the user, a UserCodeError with the whole traceback is returned.
    """
    found = _user_part(error)
    if found is None:
        if owner is None or not _is_user_module(owner.__module__):
            return None
        name, lines = class_name(owner), traceback.format_exception(error)
    else:
        name, lines = _name_of(found[1].tb_frame), traceback.format_exception(type(found[0]), *found)
    return UserCodeError(f"{name} failed while {action} ({summary(error)})\n{''.join(lines).rstrip()}")


def with_traceback(message: str, error: BaseException) -> ConfigError:
    """Return a ConfigError with the given message. If user code raised `error`, add its traceback to the message.

    In this case, the result is a UserCodeError, and the traceback starts at the user code.
    """
    found = _user_part(error)
    if found is None:
        return ConfigError(message)
    lines = traceback.format_exception(type(found[0]), *found)
    return UserCodeError(f"{message}\n{''.join(lines).rstrip()}")


def print_unexpected(command: str, error: Exception) -> int:
    """Print an exception that `ssl-COMMAND` does not expect, and return the exit code of the command.

    The code is 3 if the disk space is used up, and 2 if the memory is used up or if user code raised the exception. All
    other exceptions are bugs of sslcli: the whole traceback is printed, and the code is 1.
    """
    if is_out_of_memory(error):
        print_error(command, f"out of memory ({first_line(error)}): reduce the batch size, or the size of the images")
        return EXIT_CONFIG
    if isinstance(error, OSError) and _is_full_disk(error):
        message, code = disk_failure(error, "a file", "directory") or ("", EXIT_FAILED)
        print_error(command, message)
        return code
    found = user_code_error(f"running ssl-{command}", error)
    if found is not None:
        print_error(command, found)
        return EXIT_CONFIG
    print(printable("".join(traceback.format_exception(error)).rstrip(), keep="\n"), file=sys.stderr)
    print_error(command, BUG)
    return EXIT_BUG


# Texts of out-of-memory errors that are plain RuntimeErrors. torch's CPU allocator, MPS, the CUDA driver, cuBLAS and
# cuDNN raise such errors.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if `error` reports that the memory of a device or of the machine is used up.

    This function does not import torch. It recognizes `torch.OutOfMemoryError` by its name.
    """
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def _is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS and error.errno not in PERMISSION_ERRORS


def class_name(kind: type) -> str:
    """Return the module and the name of a class, as in `mypackage.MyMethod`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def summary(error: BaseException) -> str:
    """Return the class and the first line of an error on one line, as in `KeyError: 'name'`."""
    kind = type(error).__name__
    return f"{kind}: {first_line(error)}" if str(error).strip() else kind


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an exception, without the final period.

    If the message is empty, return the name of the exception's class.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _user_part(error: BaseException) -> tuple[BaseException, TracebackType] | None:
    """Return an exception, and the part of its traceback that starts in user code; or None if there is no user code.

    The exception is `error` or one of its causes. The part starts at the first frame in a module of the user. If there
    is no such frame, it starts at the first frame of a method of sslcli or torch that runs on an instance of a user's
    class.
    """
    on_instance = None
    cause: BaseException | None = error
    while cause is not None:
        part = cause.__traceback__
        while part is not None:
            if _is_user_module(part.tb_frame.f_globals.get("__name__")):
                return cause, part
            if on_instance is None and _is_user_module(type(_instance(part.tb_frame)).__module__):
                on_instance = cause, part
            part = part.tb_next
        cause = cause.__cause__
    return on_instance


def _is_user_module(name: object) -> bool:
    package = str(name or "__main__").partition(".")[0]
    return package not in LIBRARIES and package not in sys.stdlib_module_names and package != "__main__"


def _instance(frame: FrameType) -> object:
    """Return `self` of a frame that runs a method, else None."""
    return frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None


def _name_of(frame: FrameType) -> str:
    """Return the dotted name of the class, function or module whose code a frame runs.

    For a method, this is the class of `self`. For code outside of functions, it is the module.
    """
    instance, module = _instance(frame), frame.f_globals.get("__name__")
    if instance is not None:
        return class_name(type(instance))
    return str(module) if frame.f_code.co_name == "<module>" else f"{module}.{frame.f_code.co_name}"


def disk_failure(error: OSError, path: object, key: str) -> tuple[str, int] | None:
    """Return the message and the exit code for a failed write, or None if `error` is not a disk error.

    The exit code is 2 if the permissions do not allow the write, and 3 if the disk is full or broken.

    Args:
        error: error of the write.
        path: path for the message if `error` has no file name.
        key: setting that determines the output location, such as `run_dir`. If the permissions do not allow the write,
            the message suggests to change this setting.
    """
    if error.errno not in DISK_ERRORS:
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename or path
    what = f"{name} cannot be written ({error.strerror})"
    if error.errno in PERMISSION_ERRORS:
        return f"{what}: choose another {key}, or change its permissions", EXIT_CONFIG
    return f"{what}: free space or repair the disk, then run the same command again to resume", EXIT_FAILED


def is_disk_failure(error: OSError) -> bool:
    """Return True if the disk is full or broken. Other settings of the command then do not prevent the error."""
    return error.errno in DISK_ERRORS and error.errno not in PERMISSION_ERRORS


def nearest(name: object, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"`, where x is the known name most similar to `name`, or "" if none is similar.

    Case is ignored. The required similarity depends on the known name. It is higher if the first letters differ,
    because typing errors rarely change the first letter: for `dae`, `vae` is not suggested. It is lower if the known
    name begins with `name`: for `retry`, `retry_failed` is suggested.
    """
    from difflib import SequenceMatcher

    wanted, found = str(name).lower(), ("", 0.0)
    for option in known:
        similarity = SequenceMatcher(None, option.lower(), wanted).ratio()
        cutoff = 0.6 if option[:1].lower() == wanted[:1] else 0.75
        cutoff = 0.5 if len(wanted) > 2 and option.lower().startswith(wanted) else cutoff
        if similarity >= cutoff and similarity > found[1]:
            found = option, similarity
    return f" Did you mean {found[0]!r}?" if found[0] else ""


def check_keys(where: str, keys: Iterable[object], known: Sequence[str]) -> None:
    """Raise ValueError unless every key in `keys` is in `known`.

    The message contains `where` (the place of the keys, such as the name of a setting), the unknown key, the most
    similar known key, and all known keys.
    """
    for key in keys:
        if key not in known:
            raise ValueError(
                f"{where} has the unknown key {key!r}.{nearest(key, known)} Known keys: {', '.join(known)}"
            )


def check_integer(name: str, value: object, *, minimum: int, hint: str = "") -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`. True and False are rejected.

    The message begins with `name`, the name of the argument, and ends with `hint`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {minimum}{hint}")


def check_positive(**values: int) -> None:
    """Raise ValueError unless the value of every keyword argument is an integer of at least 1."""
    for name, value in values.items():
        check_integer(name, value, minimum=1)
