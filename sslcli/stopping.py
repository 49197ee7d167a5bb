"""Stop a run in good order: signals and the time limit, agreed on by all processes at the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from sslcli import heartbeat
from sslcli.distributed import world_size

TIME_LIMIT = "the time limit"
GRACE = 10.0  # seconds that a wait for images may last after the time limit, so that every start makes a step
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]

T = TypeVar("T")


class Interrupted(BaseException):
    """Raised by the signal handler while the run waits for images; no handler of errors may take it for one."""


class StopRequest:
    """Whether the run should save and end after the current step.

    SIGHUP, which a terminal sends when it is closed, counts unless it is ignored, as `nohup` has it.

    Args:
        max_seconds: time limit from `begun` on, or None.
        begun: when the command began, on the clock of `time.monotonic`; None: now.

    After `agreed` said yes, `by_signal` tells whether any process got a signal.
    """

    def __init__(self, max_seconds: float | None = None, *, begun: float | None = None) -> None:
        self.reason = ""
        self.by_signal = False
        self.received = 0.0
        self.is_waiting = False
        self.has_rung = False
        begun = time.monotonic() if begun is None else begun
        self.deadline = None if max_seconds is None else begun + max_seconds
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.pending: dist.Work | None = None
        ignored = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
        self.previous = {number: signal.signal(number, self.receive) for number in SIGNALS if number not in ignored}
        self.alarm = None if self.deadline is None else self.set_alarm(self.deadline - time.monotonic() + GRACE)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; interrupt a wait for images. A second interrupt from the keyboard ends the process at once.

        Under an agent one key press arrives twice, from the terminal and from the agent, within moments.
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
        """Let the time limit be the reason to stop once it is over, unless there is one already."""
        if self.deadline is not None and time.monotonic() > self.deadline and not self.reason:
            self.reason = TIME_LIMIT

    def set_alarm(self, seconds: float) -> threading.Timer:
        """A timer that interrupts this thread after `seconds`, wherever it waits then."""
        timer = threading.Timer(max(0.0, seconds), self.ring, (threading.get_ident(),))
        timer.daemon = True
        timer.start()
        return timer

    def ring(self, thread: int) -> None:
        """Interrupt a thread: only a signal reaches one that waits inside of the system."""
        self.has_rung = True
        signal.pthread_kill(thread, signal.SIGUSR1)

    def unless_stopped(self, get: Callable[[], T]) -> T | None:
        """What `get()` returns, or None where a signal interrupts it, or it takes too long after the time limit.

        With several processes it is always waited for: they can only stop together, after a step of all.
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
        """Whether all processes stop now. Call once a step on every process.

        With several processes the answer is that of the step before, so that asking never waits.
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
        heartbeat.meet()
        self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return stop

    def close(self) -> None:
        """Give the signals back."""
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm.join()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.pending is not None:
            self.pending.wait()
