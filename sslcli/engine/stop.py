"""Graceful stop on signals and at the time limit, at the same step on all processes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from sslcli.distributed import watchdog
from sslcli.distributed.collectives import world_size

TIME_LIMIT = "the time limit"
GRACE = 10.0  # seconds to wait for images after the time limit, so that each start of a run can complete a step
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]

T = TypeVar("T")


class Interrupted(BaseException):
    """Raised by the signal handler while the run waits for images. `except Exception` does not catch it."""


class StopRequest:
    """Handler of signals and of the time limit.

    After a signal or at the time limit, the run finishes the current step, saves a checkpoint and stops.

    The handled signals are `SIGNALS`. A terminal sends SIGHUP when it closes. SIGHUP is not handled if the process
    already ignores it, for example under `nohup`.

    Args:
        max_seconds: time limit in seconds, counted from `start_time`; None = no limit.
        start_time: start time of the command by `time.monotonic`; None = now.

    After `agreed` has returned True, the attribute `by_signal` is True if any process received a signal.
    """

    def __init__(self, max_seconds: float | None = None, *, start_time: float | None = None) -> None:
        self.reason = ""
        self.by_signal = False
        self.received = 0.0
        self.is_waiting = False
        self.has_rung = False
        start_time = time.monotonic() if start_time is None else start_time
        self.deadline = None if max_seconds is None else start_time + max_seconds
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.pending: dist.Work | None = None
        ignored = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
        self.previous = {number: signal.signal(number, self.receive) for number in SIGNALS if number not in ignored}
        self.alarm = None if self.deadline is None else self.set_alarm(self.deadline - time.monotonic() + GRACE)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Record the signal, and interrupt a wait for images. A second Ctrl-C ends the process immediately.

        If a launcher such as torchrun started this process, one Ctrl-C arrives twice: from the terminal and from the
        launcher. Therefore a repeated SIGINT within 2 seconds does not count as a second Ctrl-C.
        """
        now = time.monotonic()
        if self.reason and number == signal.SIGINT and now - self.received > 2:
            raise KeyboardInterrupt
        self.received = now
        if self.has_rung and number == signal.SIGUSR1:
            self.has_rung = False
            self.check_time()
        else:
            self.reason = f"signal {signal.Signals(number).name}"
        if self.is_waiting:
            self.is_waiting = False
            raise Interrupted

    def check_time(self) -> None:
        """If the time limit has passed, set it as the reason to stop. A reason that is already set is kept."""
        if self.deadline is not None and time.monotonic() > self.deadline and not self.reason:
            self.reason = TIME_LIMIT

    def set_alarm(self, seconds: float) -> threading.Timer:
        """Start and return a timer that interrupts the calling thread after `seconds`.

        The timer also interrupts a thread that is blocked in a system call.
        """
        timer = threading.Timer(max(0.0, seconds), self.ring, (threading.get_ident(),))
        timer.daemon = True
        timer.start()
        return timer

    def ring(self, thread: int) -> None:
        """Send a signal to a thread. Only a signal interrupts a thread that is blocked in a system call."""
        self.has_rung = True
        signal.pthread_kill(thread, signal.SIGUSR1)

    def unless_stopped(self, get: Callable[[], T]) -> T | None:
        """Return `get()`, or None if the call was interrupted.

        With one process, a received signal interrupts the call. The time limit does not interrupt it immediately: after
        the time limit, the call may take up to `GRACE` seconds. With several processes, the call is never interrupted,
        because all processes must stop after the same step.
        """
        if world_size() > 1:
            return get()
        late = self.set_alarm(GRACE) if self.reason else None
        try:
            try:
                self.is_waiting = True
                return get()
            finally:
                self.is_waiting = False
        except Interrupted:
            self.by_signal = self.reason != TIME_LIMIT
            return None
        finally:
            if late is not None:
                late.cancel()

    def agreed(self) -> bool:
        """Return True if all processes must stop now. Every process must call this method once per step.

        With several processes, the method returns the decision of the previous step, so that no process waits for the
        others.
        """
        self.check_time()
        mine = 0 if not self.reason else 1 if self.reason == TIME_LIMIT else 2
        if world_size() == 1:
            self.by_signal = mine == 2
            return mine > 0
        stop = False
        if self.pending is not None:
            self.pending.wait()
            stop, self.by_signal = bool(self.flag.item()), self.flag.item() == 2
        self.flag.fill_(mine)
        watchdog.record_collective()
        self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return stop

    def close(self) -> None:
        """Cancel the alarm and restore the previous signal handlers."""
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm.join()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.pending is not None:
            self.pending.wait()
