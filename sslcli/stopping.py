"""Stopping in good order: signals and the time limit, agreed on by all processes at the same step."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from sslcli import heartbeat
from sslcli.distributed import world_size

TIME_LIMIT = "the time limit"
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


class StopRequest:
    """Whether the run should save and end after the current step.

    Args:
        max_seconds: time limit from `begun` on, or None.
        begun: when the command began, on the clock of `time.monotonic`; None: now.

    After `agreed` said yes, `by_signal` tells whether any process got a signal.
    """

    def __init__(self, max_seconds: float | None = None, *, begun: float | None = None) -> None:
        self.reason = ""
        self.by_signal = False
        self.received = 0.0
        begun = time.monotonic() if begun is None else begun
        self.deadline = None if max_seconds is None else begun + max_seconds
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.pending: dist.Work | None = None
        self.previous = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second interrupt from the keyboard ends the process at once.

        Under an agent one key press arrives twice, from the terminal and from the agent, within moments.
        """
        now = time.monotonic()
        if self.reason and number == signal.SIGINT and now - self.received > 2:
            raise KeyboardInterrupt
        self.received = now
        self.reason = f"signal {signal.Signals(number).name}"

    def agreed(self) -> bool:
        """Whether all processes stop now. Call once a step on every process.

        With several processes the answer is that of the step before, so that asking never waits.
        """
        if self.deadline is not None and time.monotonic() > self.deadline and not self.reason:
            self.reason = TIME_LIMIT
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
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.pending is not None:
            self.pending.wait()
