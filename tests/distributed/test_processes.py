"""Rank, restarts and errors of a process of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslcli.distributed.processes import end_process, restarted, start_time


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


def test_the_reason_is_printed_without_an_agent_and_if_its_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for _ in range(2):
        assert end_process("eval", "first", 3, wait=0) == 3
    assert capsys.readouterr().err == "ssl-eval: first\n" * 2
    for path in ("", str(tmp_path / "gone/0/error.json")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
        end_process("eval", "second", 2, wait=0)
    assert capsys.readouterr().err == "ssl-eval: second\n" * 2
