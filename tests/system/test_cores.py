"""sslcli/system/cores.py: which cores a process may use, and how many of them are its own."""

from __future__ import annotations

import pytest

from sslcli.system import cores


def test_cores_that_a_process_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {5, 3, 9})
    assert cores.usable() == [3, 5, 9]


def test_a_system_that_binds_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert cores.usable() == list(range(8))


@pytest.mark.parametrize(("processes", "expected"), [(None, 6), ("1", 6), ("2", 3), ("4", 1), ("12", 1)])
def test_processes_of_a_run_share(processes: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    if processes is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert cores.share() == expected
