"""Messages and exit codes of errors that end a training process."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

from sslcli.config.run_config import RunConfig
from sslcli.data.workers import worker_died_error
from sslcli.distributed import processes
from sslcli.engine import checkpoint
from sslcli.errors import (
    DISK_ERRORS,
    EXIT_FAILED,
    ConfigError,
    ProcessLost,
    is_out_of_memory,
)
from sslcli.report.terminal import log_and_print
from sslcli.runs.out_of_memory import training_message

WAIT = 2.0  # seconds that ranks other than 0 wait before they print, see end_process
DEAD_WORKER = "DataLoader worker"  # text of the error that torch raises at any point if a data worker dies
UNUSED_IN_STEP = "Expected to have finished reduction in the prior iteration"  # text of torch's error
UNUSED_MESSAGE = (
    "method: a step used only some of the trainable parameters, but with several processes the loss of every step must "
    "depend on all of them: add 0 times the unused output to the loss, or train with launcher=local"
)
LOST_CONTACT = "another process of this run ended; run the same command again to resume"


class LostContact(ProcessLost):
    """Another process of the run ended. That process prints why, unless the network connection failed."""


def with_message(error: RuntimeError | MemoryError, config: RunConfig) -> Exception:
    """Return the exception with a message for users, or `error` itself if its cause is unknown."""
    if is_out_of_memory(error):
        return ConfigError(training_message(error, config))
    if DEAD_WORKER in str(error):
        return worker_died_error(error)
    if UNUSED_IN_STEP in str(error):
        return ConfigError(UNUSED_MESSAGE)
    if processes.lost_contact(error):
        return LostContact(f"{LOST_CONTACT} (noticed here: {str(error).strip().splitlines()[0]})")
    return error


def has_own_message(run_dir: Path, error: BaseException) -> bool:
    """Return True if the functions of this module have their own message for the cause of `error`.

    There are four such causes: a data worker died, another process of the run ended, the loss of a step did not depend
    on all trainable parameters, or a file of the run was deleted. These errors can also be raised while code of the
    user runs, although that code did not cause them.
    """
    if isinstance(error, OSError):
        return deletion(error, run_dir) is not None
    known = any(text in str(error) for text in (DEAD_WORKER, UNUSED_IN_STEP))
    return isinstance(error, RuntimeError) and (known or processes.lost_contact(error))


def deletion(error: OSError, run_dir: Path) -> tuple[str, int] | None:
    """Return the message and exit code if `error` was raised because a file in `run_dir` was deleted, else None."""
    if error.errno not in (errno.ENOENT, errno.ESTALE) or not error.filename:
        return None
    path = Path(os.fsdecode(error.filename))
    if not path.absolute().is_relative_to(run_dir.absolute()):
        return None
    if not run_dir.exists():
        return str(checkpoint.deleted(run_dir)), EXIT_FAILED
    return f"{path} was deleted during the run: run the same command again to resume", EXIT_FAILED


def ignore_disk_error(failure: threading.ExceptHookArgs) -> None:
    """Ignore disk errors in TensorBoard's thread. The next write of the main thread raises the same error."""
    ignored = (*DISK_ERRORS, errno.ENOENT, errno.ESTALE)
    if not isinstance(failure.exc_value, OSError) or failure.exc_value.errno not in ignored:
        threading.__excepthook__(failure)


def end_process(message: BaseException | str, code: int, *, wait: float | None = None) -> int:
    """Print why this process ends, and return the exit code, see `processes.end_process`.

    By default (`wait` is None), rank 0 prints immediately, and all other ranks first wait `WAIT` seconds. If `wait` is
    a number, every rank waits this number of seconds.
    """
    wait = wait if wait is not None else WAIT if processes.number() > 0 else 0.0
    return processes.end_process("train", message, code, wait=wait)


def end_stalled_process(run_dir: Path, message: str) -> None:
    """End this process from its watchdog thread.

    If `message` is not "", it is first printed and appended to console.log. If `message` is "", another process prints
    the message. This process then waits `WAIT` seconds before it ends, so that the other process has time to print.
    """
    if message:
        log_and_print(run_dir, message)
    else:
        time.sleep(WAIT)
    os._exit(EXIT_FAILED)
