from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from processes import Pair
from sslcli.engine import stop as stopping
from sslcli.engine.stop import SIGNALS, StopRequest


@pytest.fixture
def request_of_this_process() -> Iterator[StopRequest]:
    stop = StopRequest()
    yield stop
    stop.close()


class Clock:
    """Stands in for `time` in the module."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopping, "time", clock)
    return clock


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_after_the_step_and_is_named(number: signal.Signals) -> None:
    stop = StopRequest()
    try:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.agreed()
        assert stop.reason == f"signal {number.name}"
        assert stop.by_signal
    finally:
        stop.close()


def test_closing_gives_the_signals_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = StopRequest()
    assert [signal.getsignal(number) for number in SIGNALS] == [stop.receive] * len(SIGNALS)
    stop.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_time_limit_stops_once_it_is_over(clock: Clock) -> None:
    stop = StopRequest(60)
    try:
        clock.now += 60
        assert not stop.agreed()
        clock.now += 0.1
        assert stop.agreed()
        assert stop.reason == "the time limit"
        assert not stop.by_signal
    finally:
        stop.close()


def test_a_signal_before_the_time_limit_stays_the_reason(clock: Clock) -> None:
    stop = StopRequest(60)
    try:
        stop.receive(signal.SIGUSR1, None)
        clock.now += 100
        assert stop.agreed()
        assert stop.reason == "signal SIGUSR1"
    finally:
        stop.close()


def test_a_second_interrupt_ends_at_once_but_not_the_echo_of_the_first(
    clock: Clock, request_of_this_process: StopRequest
) -> None:
    stop = request_of_this_process
    stop.receive(signal.SIGINT, None)
    clock.now += 1
    stop.receive(signal.SIGINT, None)  # the same key press, sent on by an agent
    clock.now += 3
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)


def test_a_repeated_termination_still_waits_for_the_checkpoint(
    clock: Clock, request_of_this_process: StopRequest
) -> None:
    for _ in range(3):
        request_of_this_process.receive(signal.SIGTERM, None)
        clock.now += 10
    assert request_of_this_process.agreed()


def steps_until_both_stop(signaled: int | None) -> tuple[list[bool], str, bool]:
    """Return the decisions of a process at four steps; before the second, one gets a signal or its time is over."""
    stop = StopRequest()
    heard = []
    try:
        for step in range(4):
            if step == 1 and dist.get_rank() == signaled:
                os.kill(os.getpid(), signal.SIGUSR1)
            if step == 1 and signaled is None and dist.get_rank() == 1:
                stop.deadline = 0.0
            heard.append(stop.agreed())
    finally:
        stop.close()
    return heard, stop.reason, stop.by_signal


@pytest.mark.parametrize("signaled", [0, 1])
def test_processes_stop_at_the_same_step_whichever_got_the_signal(signaled: int, pair: Pair) -> None:
    answers = pair.run(steps_until_both_stop, signaled)
    assert [heard for heard, _, _ in answers] == [[False, False, True, True]] * 2
    reasons = [reason for _, reason, _ in answers]
    assert reasons[signaled] == "signal SIGUSR1"
    assert reasons[1 - signaled] == ""
    assert [by_signal for _, _, by_signal in answers] == [True, True]


def test_processes_agree_that_it_was_no_signal_but_the_time_limit_of_one(pair: Pair) -> None:
    answers = pair.run(steps_until_both_stop, None)
    assert answers == [
        ([False, False, True, True], "", False),
        ([False, False, True, True], "the time limit", False),
    ]
