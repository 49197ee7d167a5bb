"""Signals that stop a command which has no state to save."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedBySignal(BaseException):
    """Raised by the signal handler to stop the command. Its message is the name of the signal.

    The class is not derived from Exception, so that no error handler catches it.
    """


@contextmanager
def raised_signals() -> Iterator[None]:
    """Raise StoppedBySignal in the `with` block if a signal arrives. Then restore the signal handlers.

    A scheduler sends SIGTERM, SIGUSR1 or SIGUSR2 before it ends a job. A terminal sends SIGHUP when it closes.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGTERM:  # Slurm repeats the signal until the job responds
            signal.signal(number, signal.SIG_IGN)
        raise StoppedBySignal(signal.Signals(number).name)

    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    numbers += [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]  # ignored under nohup
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
