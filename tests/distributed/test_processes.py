"""Rank, restarts and errors of a process of a run."""

from __future__ import annotations

import pytest

from sslcli.distributed.processes import restarted, start_time


def test_a_process_knows_whether_it_was_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restarted()
    monkeypatch.setenv("SSLCLI_RESTARTS", "2")
    assert restarted()
    monkeypatch.setenv("SSLCLI_BEGUN", "12.5")
    assert start_time() == 12.5
