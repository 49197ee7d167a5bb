"""`--multirun`: every job a process of its own, checked before the first one starts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from command_line import SMALL, Cli, installed
from runs import metrics
from sslcli.cli._sweep import Outcome, print_table, run_process

LINE = [*SMALL, "monitor.knn_k=10", "--multirun", "seed=0,1"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder a sweep of two seeds was started in, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, installed(folder, "ssl-train", *LINE)


def jobs_of(folder: Path) -> list[Path]:
    """The run directories of the sweep started in a folder, by seed."""
    (sweep,) = (folder / "runs").iterdir()
    return sorted(
        (path for path in sweep.iterdir() if path.is_dir()),
        key=lambda path: (path / "overrides.txt").read_text().partition("seed=")[2],
    )


def test_each_job_has_a_directory_of_its_own_and_a_line_in_the_table(swept: tuple[Path, str]) -> None:
    folder, told = swept
    jobs = jobs_of(folder)
    assert len(jobs) == 2
    assert all((job / "done").exists() for job in jobs)
    rows = [line.split() for line in told.splitlines() if line.startswith("   0 ")]
    assert [row[-1] for row in rows] == ["seed=0", "seed=1"]
    shown = [float(row[1]) for row in rows]
    assert shown == [round(100 * metrics(job)[-1]["monitor/knn_top1"], 1) for job in jobs]
    assert f"ssl-eval run={jobs[0].parent.relative_to(folder)}" in told


def test_a_job_of_a_sweep_is_the_run_it_would_be_alone(swept: tuple[Path, str], run_dir: Path) -> None:
    first, second = jobs_of(swept[0])
    assert metrics(first) == metrics(run_dir)
    assert metrics(second) != metrics(run_dir)


def test_jobs_are_processes(swept: tuple[Path, str]) -> None:
    owners = {(job / ".lock").read_text() for job in jobs_of(swept[0])}
    assert len(owners) == 2


def test_the_same_sweep_again_trains_nothing(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    before = {path: path.stat().st_mtime_ns for job in jobs_of(folder) for path in job.rglob("*") if path.is_file()}
    told = installed(folder, "ssl-train", "--multirun", *[part for part in LINE if part != "--multirun"])
    assert told.count("this run is finished already") == 2
    after = {path: path.stat().st_mtime_ns for job in jobs_of(folder) for path in job.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("wrong", ["method=byol,mocooo", "train.epochs=1,abc", "optimizer.lr=0.1,x"])
def test_a_mistake_in_the_last_job_is_found_before_the_first_starts(wrong: str, cli: Cli, tmp_path: Path) -> None:
    ended = cli("ssl-train", *SMALL, "-m", wrong)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    assert wrong.partition(",")[2] in ended.err
    assert list(tmp_path.iterdir()) == []


def test_jobs_that_would_share_a_run_directory_are_refused(cli: Cli) -> None:
    ended = cli("ssl-train", "-m", "seed=0,1", "run_dir=same")
    assert ended.code == 2
    assert "hydra.sweep.dir=same" in ended.err


STUBBORN = """
import signal, sys, time
caught = []
signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
open(sys.argv[1], "w").close()
until = time.monotonic() + 20
while not caught and time.monotonic() < until:
    time.sleep(0.01)
sys.exit(75 if caught else 1)
"""


def test_a_signal_reaches_the_job_and_the_sweep_waits_for_it(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def stop_when_ready() -> None:
        while not ready.exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop_when_ready, daemon=True).start()
    stopped_by: list[int] = []
    assert run_process([sys.executable, "-c", STUBBORN, str(ready)], stopped_by) == 75
    assert stopped_by == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stopped_sweep_starts_no_more_jobs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def stopped(line: list[str], stopped_by: list[int]) -> int:
        started.append(line)
        stopped_by.append(signal.SIGTERM)
        return 75

    monkeypatch.setattr("sslcli.cli._sweep.run_process", stopped)
    ended = cli("ssl-train", "-m", "seed=0,1")
    assert ended.code == 75
    assert len(started) == 1
    assert ended.out.count("(not started)") == 1


def test_a_failed_job_does_not_keep_the_others_from_running(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([3, 0])
    monkeypatch.setattr("sslcli.cli._sweep.run_process", lambda line, stopped_by: next(codes))
    ended = cli("ssl-train", "-m", "seed=0,1")
    assert ended.code == 3
    assert [line.split()[0] for line in ended.out.splitlines() if "seed=" in line and "===" not in line] == ["3", "0"]


def test_a_job_gets_the_flags_that_it_needs(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: list[list[str]] = []

    def note(line: list[str], stopped_by: list[int]) -> int:
        lines.append(line[1:])
        return 0

    monkeypatch.setattr("sslcli.cli._sweep.run_process", note)
    (tmp_path / "my/method").mkdir(parents=True)
    (tmp_path / "my/method/mine.yaml").write_text("_target_: sslcli.methods.byol.BYOL\n")
    # Flags may stand between overrides, and a folder may have a name that needs quoting.
    ended = cli("ssl-train", "method=mine", "-m", "seed=3", "--config-dir", "my", 'hydra.sweep.dir="a=b"')
    assert (ended.code, ended.err) == (0, "")
    ((first, *rest),) = lines
    assert [first, *rest[:2]] == ["-m", "sslcli.cli.train", f"--config-dir={tmp_path / 'my'}"]
    assert rest[2:4] == ["method=mine", "seed=3"]
    assert rest[4].startswith(f'run_dir="{tmp_path}/a=b/mine_shapes_small_')


def test_the_table_tells_how_each_job_ended(capsys: Any) -> None:
    print_table([Outcome("seed=0", 0, 0.123), Outcome("seed=1", 3, None), Outcome("seed=2", None, None)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["0", "12.3", "%", "seed=0"],
        ["3", "-", "seed=1"],
        ["-", "-", "seed=2", "(not", "started)"],
    ]
