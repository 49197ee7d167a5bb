"""CPU cores of a process, and the spin count of OpenMP, which is set before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import SMALL
from sslcli.system import cpu


def test_cores_that_a_process_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {5, 3, 9})
    assert cpu.usable() == [3, 5, 9]


def test_a_system_that_binds_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert cpu.usable() == list(range(8))


@pytest.mark.parametrize(("processes", "expected"), [(None, 6), ("1", 6), ("2", 3), ("4", 1), ("12", 1)])
def test_processes_of_a_run_share(processes: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    if processes is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert cpu.cores_per_process() == expected


@pytest.mark.parametrize(
    ("quota", "processes", "expected"), [(None, 1, 6), (4.0, 1, 4), (3.5, 1, 4), (0.5, 1, 1), (99.0, 1, 6), (4.0, 2, 2)]
)
def test_a_quota_limits_the_cores(
    quota: float | None, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr("sslcli.system.cgroup.cpu_quota", lambda: quota)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cpu.cores_per_process() == expected


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "99"}, 6),
        ({"OMP_NUM_THREADS": " 4,2"}, 4),
        ({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "x"}, 2),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "-1"}, None),
        ({"OMP_NUM_THREADS": ""}, None),
        ({"OMP_NUM_THREADS": "1"} | TORCHRUN, None),
        ({"OMP_NUM_THREADS": "2"} | TORCHRUN, 2),
        ({"OMP_NUM_THREADS": "1", "SSLCLI_AGENT": "7"} | TORCHRUN, 1),
        ({"MKL_NUM_THREADS": "1"} | TORCHRUN, 1),
    ],
)
def test_threads_that_the_environment_requests(
    environment: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SSLCLI_AGENT", *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cpu.requested_threads() == expected


def reported(tmp_path: Path, **environment: str) -> str:
    """Return the settings that GNU OpenMP prints when `ssl-train` loads it."""
    # Commands that other tests called in this process have set it.
    ours = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    ended = subprocess.run(
        [str(Path(sys.executable).with_name("ssl-train")), *SMALL, "dry_run=true"],
        cwd=tmp_path,
        env=ours | {"OMP_DISPLAY_ENV": "verbose"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return next(line for line in ended.stderr.splitlines() if "GOMP_SPINCOUNT" in line)


@pytest.mark.parametrize(("environment", "spins"), [({}, "'5000'"), ({"GOMP_SPINCOUNT": "77"}, "'77'")])
def test_threads_that_wait_sleep_soon_unless_the_user_has_chosen(tmp_path, environment, spins):
    assert reported(tmp_path, **environment).endswith(spins)


def test_the_policy_of_the_user_is_left_alone(tmp_path):
    assert not reported(tmp_path, OMP_WAIT_POLICY="active").endswith("'5000'")
