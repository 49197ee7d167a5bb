"""Signals that stop a command raise an exception, and the handlers are restored."""

from __future__ import annotations

import os
import signal

import pytest

from sslcli.system.stop_signals import StoppedBySignal, raised_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_is_raised_with_its_name(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignal, match=number.name), raised_signals():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
