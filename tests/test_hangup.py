"""SIGHUP, which a closed terminal sends: a run saves and stops as after SIGTERM; under nohup it continues."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from small_runs import family, last_step, newest, start, survivors, wait_for_step

COMMAND = [
    "backbone.width=4",
    "dataset.limit=128",
    "train.batch_size=16",
    "train.save_every_epochs=0",
    "train.log_every_steps=1",
    "monitor.pictures=0",
    "monitor.knn_every_epochs=0",
]
LAUNCHERS = [(), ("launcher=multi", "launcher.processes=2")]


@contextmanager
def nohup() -> Iterator[None]:
    """Processes started in the block ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["one process", "launcher=multi"])
def test_a_hangup_saves_and_stops(launcher: tuple[str, ...], tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(*COMMAND, *launcher, "train.max_steps=100000", f"run_dir={run_dir}", log=log)
    wait_for_step(process, run_dir, 4)
    others = family(process.pid)
    os.kill(process.pid, signal.SIGHUP)
    assert process.finish() == 75, log.read_text()[-2000:]
    assert newest(run_dir)["step"] >= 4
    assert "stopped by signal SIGHUP after step" in log.read_text()
    assert survivors(others, within=10) == []


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["one process", "launcher=multi"])
def test_under_nohup_a_hangup_changes_nothing(launcher: tuple[str, ...], tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with nohup():
        process = start(*COMMAND, *launcher, "train.max_steps=60", f"run_dir={run_dir}", log=log)
    wait_for_step(process, run_dir, 4)
    for pid in (process.pid, *family(process.pid)):
        os.kill(pid, signal.SIGHUP)
    assert process.finish() == 0, log.read_text()[-2000:]
    assert last_step(run_dir) == 60


def test_ctrl_c_before_several_processes_train_shows_no_traceback(tmp_path: Path) -> None:
    """The processes are importing torch then."""
    log = tmp_path / "log"
    process = start(*COMMAND, *LAUNCHERS[1], f"run_dir={tmp_path / 'run'}", log=log)
    until = time.monotonic() + 60
    while len([pid for pid in family(process.pid) if "libtorch" in Path(f"/proc/{pid}/maps").read_text()]) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    for pid in (process.pid, *family(process.pid)):
        os.kill(pid, signal.SIGINT)
    assert process.finish() in (75, 130)
    assert "Traceback" not in log.read_text(), log.read_text()
