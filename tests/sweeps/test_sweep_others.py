"""Jobs of a sweep that another process runs: an orphan of a killed sweep, another sweep, a run started by hand."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from small_sweeps import column, prepared_sweep, start_sweep, wait_until
from sslcli.sweeps import queue, table
from sslcli.sweeps.job import Job, Sweep
from sslcli.sweeps.queue import Relay
from sslcli.system import locks

HERE = ["device=cpu", "hydra.sweep.dir=here", "-m"]


def starts(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*/starts"))


def orphan(folder: Path, *more: str) -> int:
    """Kill a sweep whose job waits for a signal; return the process id of the job."""
    sweep = start_sweep(*HERE, "seed=5", *more, cwd=folder)
    wait_until(lambda: starts(folder / "here") == 1, "the job is at work")
    (record,) = (folder / "here/jobs").glob("*.json")
    wait_until(lambda: json.loads(record.read_text())["process"] is not None, "the job is noted")
    sweep.kill()
    sweep.wait()
    return int(json.loads(record.read_text())["process"])


def when_it_waits(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Act once the sweep of this process has printed that it waits."""
    describe = queue.describe_runner

    def describe_runner(sweep: Sweep, job: Job) -> str:
        threading.Timer(0.2, act).start()
        return describe(sweep, job)

    monkeypatch.setattr(queue, "describe_runner", describe_runner)


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_an_orphan_that_still_saves_is_waited_for_and_gone_on_with(
    launcher: str, quick_jobs: None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = orphan(tmp_path)
    when_it_waits(monkeypatch, lambda: os.kill(process, signal.SIGTERM))
    ended = cli("ssl-train", *HERE, "seed=5,0", f"hydra/launcher={launcher}", "sweep.jobs=1")
    assert ended.code == 0
    assert "2 jobs in" in ended.out
    assert "1 running; 1 to run, 1 to wait for" in ended.out
    assert ended.out.count(f"waiting     seed=5: process {process} on {os.uname().nodename} is running it") == 1
    assert column(tmp_path / "here", "status") == {"5": "finished", "0": "finished"}
    assert starts(tmp_path / "here") == 3


def test_a_signal_ends_the_wait_and_leaves_the_orphan_alone(
    quick_jobs: None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = orphan(tmp_path)
    when_it_waits(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    ended = cli("ssl-train", *HERE, "seed=5")
    assert ended.code == 75
    assert time.monotonic() - began < 20
    assert column(tmp_path / "here", "status") == {"5": "running"}
    os.kill(process, signal.SIGTERM)


def test_two_identical_sweeps_at_once_both_succeed_and_run_each_job_once(
    quick_jobs: None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*HERE, "seed=7,0,1,2", "sweep.jobs=2"]
    when_it_waits(monkeypatch, (tmp_path / "here/go").touch)
    other = start_sweep(*line, cwd=tmp_path)
    wait_until(lambda: starts(tmp_path / "here") > 0, "the other sweep is at work")
    assert cli("ssl-train", *line).code == 0
    assert other.wait(60) == 0
    assert set(column(tmp_path / "here", "status").values()) == {"finished"}
    assert starts(tmp_path / "here") == 4


def test_a_run_by_hand_in_the_directory_of_a_job_is_waited_for(
    quick_jobs: None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    lock = (tmp_path / "mine/.lock").open("w")
    lock.write("process 7 on node3")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    when_it_waits(monkeypatch, lock.close)
    ended = cli("ssl-train", *HERE, "run_dir=mine", "seed=1")
    assert ended.code == 0
    assert "process 7 on node3 is running it" in ended.out
    assert (tmp_path / "mine/done").exists()


def test_a_file_system_without_locks_runs_the_jobs_all_the_same(
    quick_jobs: None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    locks.can_lock.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert cli("ssl-train", *HERE, "seed=0,1,2", "sweep.jobs=2").code == 0
    locks.can_lock.cache_clear()
    cores = [json.loads(path.read_text())["cores"] for path in tmp_path.glob("here/*/starts")]
    assert len(cores) == 3


def test_the_table_has_the_steps_of_sharded_runs(tmp_path: Path) -> None:
    sweep, _ = prepared_sweep(tmp_path)
    for name in ("step-00000009.pt", "step-00000012", "step-00000015.tmp"):
        (tmp_path / "one/checkpoints" / name).mkdir(parents=True)
    (row,) = table.update(sweep)
    assert row.steps == 12


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Relay() as relay:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not relay.is_stopping
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
