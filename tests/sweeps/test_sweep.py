"""`--multirun`: every job runs in a separate process; records of the jobs outlive the sweep."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import SMALL, Cli, installed
from small_runs import metrics
from small_sweeps import column, signal_when_started, table
from sslcli.sweeps import table as _sweep_table
from sslcli.sweeps.job import stop_with_sweep

LINE = [*SMALL, "monitor.knn_k=10", "--multirun", "seed=0,1", "sweep.jobs=1"]
HERE = ["device=cpu", "hydra.sweep.dir=here", "-m"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder a sweep of two seeds was started in, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, installed(folder, "ssl-train", *LINE)


def jobs_of(folder: Path) -> list[Path]:
    """The run directories of the sweep started in a folder, by seed."""
    (sweep,) = (folder / "runs").iterdir()
    found = (path.parent for path in sweep.glob("*/overrides.txt"))
    return sorted(found, key=lambda path: (path / "overrides.txt").read_text().partition("seed=")[2])


def starts(folder: Path, seed: int) -> int:
    """Return how often the job with a seed was started."""
    path = folder / column(folder, "run_dir")[str(seed)] / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_each_job_has_a_directory_of_its_own_and_a_line_in_the_tables(swept: tuple[Path, str]) -> None:
    folder, output = swept
    jobs = jobs_of(folder)
    assert all((job / "done").exists() for job in jobs)
    measured = {str(seed): metrics(job)[-1]["monitor/knn_top1"] for seed, job in enumerate(jobs)}
    rows = table(jobs[0].parent)
    assert {row["seed"]: float(row["monitor/knn_top1"]) for row in rows} == measured
    assert {row["seed"]: row["run_dir"] for row in rows} == {str(seed): job.name for seed, job in enumerate(jobs)}
    assert [(row["status"], row["exit_code"], row["steps"]) for row in rows] == [("finished", "0", "3")] * 2
    assert rows[0]["train.batch_size"] == "32"
    for row, line in zip(rows, output.splitlines()[-4:-2], strict=True):
        shown = f"{100 * float(row['monitor/knn_top1']):.1f}"
        assert line.split()[1:] == [row["seed"], "finished", "0", "3", shown, "%", row["run_dir"]]


def test_a_job_of_a_sweep_is_the_run_it_would_be_alone(swept: tuple[Path, str], run_dir: Path) -> None:
    first, second = jobs_of(swept[0])
    assert metrics(first) == metrics(run_dir)
    assert metrics(second) != metrics(run_dir)
    assert "sweep.jobs" not in (first / "overrides.txt").read_text()


def test_jobs_are_processes(swept: tuple[Path, str]) -> None:
    owners = {(job / ".lock").read_text() for job in jobs_of(swept[0])}
    assert len(owners) == 2


def test_the_same_sweep_again_starts_nothing(
    swept: tuple[Path, str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = swept
    monkeypatch.chdir(folder)
    files = [path for job in jobs_of(folder) for path in job.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    ended = cli("ssl-train", *LINE)
    assert ended.code == 0
    assert "2 finished; 0 to run" in ended.out
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.parametrize("wrong", ["method=byol,mocooo", "train.epochs=1,abc", "optimizer.lr=0.1,x"])
def test_a_mistake_in_the_last_job_is_found_before_the_first_starts(wrong: str, cli: Cli, tmp_path: Path) -> None:
    ended = cli("ssl-train", *SMALL, "-m", wrong)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    assert wrong.partition(",")[2] in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("sweep.metric=monitor/knn_top", "Did you mean 'monitor/knn_top"),
        ("sweep.metric=knn", "scalar of metrics.jsonl"),
        ("sweep.metric=train/agreement", "set sweep.direction to max or min"),
        ("sweep.metric=null", "must be a string"),
        ("sweep.direction=up", "one of: auto, max, min"),
        ("sweep.jobs=0", "at least 1"),
        ("sweep.jobs=many", "integer"),
        ("sweep.retry_failed=perhaps", "true or false"),
        ("sweep.retry=true", "retry_failed"),
        ("sweep=2", "must be a mapping with the keys"),
        ("hydra.sweep.dir=file/runs", "choose another"),
    ],
)
def test_a_wrong_setting_of_the_sweep_is_refused_in_one_line(
    wrong: str, expected: str, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ended = cli("ssl-train", "-m", "seed=0,1", wrong)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    assert expected in ended.err


def test_jobs_that_would_share_a_run_directory_are_refused(cli: Cli) -> None:
    ended = cli("ssl-train", "-m", "seed=0,1", "run_dir=same")
    assert ended.code == 2
    assert "hydra.sweep.dir=" in ended.err
    ended = cli("ssl-train", "-m", "train.max_time=1h,2h")
    assert ended.code == 2
    assert "'train.max_time=1h' and 'train.max_time=2h'" in ended.err


def test_jobs_in_directories_that_were_given_are_kept_apart(quick_jobs: None, cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *HERE, "run_dir=one,two").code == 0
    assert (tmp_path / "one/done").exists()
    assert sorted(row["run_dir"] for row in table(tmp_path / "here")) == [str(tmp_path / "one"), str(tmp_path / "two")]


def test_jobs_that_fail_or_are_killed_do_not_keep_the_others_from_running(
    quick_jobs: None, cli: Cli, tmp_path: Path
) -> None:
    ended = cli("ssl-train", *HERE, "seed=3,4,6,0,1", "sweep.jobs=2")
    assert ended.code == 3
    here = tmp_path / "here"
    assert column(here, "status") == {
        "3": "failed",
        "4": "interrupted",
        "6": "failed",
        "0": "finished",
        "1": "finished",
    }
    assert column(here, "exit_code") == {"3": "3", "4": "-9", "6": "2", "0": "0", "1": "0"}
    assert column(here, "steps") == {"3": "1", "4": "1", "6": "", "0": "3", "1": "3"}
    assert [row["seed"] for row in table(here)] == ["1", "0", "4", "3", "6"]
    assert "a loss that is not a number" in "".join(path.read_text() for path in here.glob("jobs/*.log"))


def test_the_same_command_goes_on_with_what_was_killed_and_retries_what_failed_when_told_to(
    quick_jobs: None, cli: Cli, tmp_path: Path
) -> None:
    line = ["ssl-train", *HERE, "seed=0,3,4"]
    here = tmp_path / "here"
    assert cli(*line).code == 3
    ended = cli(*line)
    assert ended.code == 3
    assert "1 finished, 1 failed, 1 interrupted; 1 to run" in ended.out
    assert "sweep.retry_failed=true" in ended.out
    assert column(here, "status") == {"0": "finished", "3": "failed", "4": "finished"}
    assert [starts(here, seed) for seed in (0, 3, 4)] == [1, 1, 2]
    assert cli(*line, "sweep.retry_failed=true").code == 0
    assert [starts(here, seed) for seed in (0, 3, 4)] == [1, 2, 2]


def test_a_sweep_that_grows_keeps_what_there_is(quick_jobs: None, cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *HERE, "seed=0,1").code == 0
    ended = cli("ssl-train", *HERE, "seed=1,2", "sweep.metric=train/loss")
    assert ended.code == 0
    assert "2 jobs in" in ended.out
    assert "1 finished; 1 to run" in ended.out
    here = tmp_path / "here"
    assert [row["seed"] for row in table(here)] == ["0", "1", "2"]
    assert column(here, "train/loss") == {"0": "1.0", "1": "2.0", "2": "3.0"}
    assert [starts(here, seed) for seed in (0, 1, 2)] == [1, 1, 1]
    assert cli("ssl-train", *HERE, "seed=0,1,2", "sweep.direction=min").code == 0
    assert [row["seed"] for row in table(here)] == ["0", "1", "2"]
    assert cli("ssl-train", *HERE, "seed=0,1,2").code == 0
    assert [row["seed"] for row in table(here)] == ["2", "1", "0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_makes_jobs_at_work_save_and_the_same_command_goes_on(
    number: signal.Signals, quick_jobs: None, cli: Cli, tmp_path: Path
) -> None:
    line = ["ssl-train", *HERE, "seed=5,0", "sweep.jobs=1"]
    before = signal.getsignal(number)
    signal_when_started(number, tmp_path / "here", starts=1)
    ended = cli(*line)
    assert ended.code == 75
    assert signal.getsignal(number) is before
    here = tmp_path / "here"
    assert column(here, "status") == {"5": "stopped", "0": "waiting"}
    assert "stopped" in ended.out.splitlines()[-4]
    assert starts(here, 0) == 0
    assert cli(*line).code == 0
    assert column(here, "steps") == {"5": "3", "0": "3"}


def test_a_job_gets_the_flags_that_it_needs(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "note.py"
    script.write_text("import json, sys\njson.dump(sys.argv[1:], open('line.json', 'w'))\n")
    monkeypatch.setattr("sslcli.sweeps.sweep.program_of", lambda command: (sys.executable, str(script)))
    (tmp_path / "my/method").mkdir(parents=True)
    (tmp_path / "my/method/mine.yaml").write_text("_target_: sslcli.methods.byol.BYOL\n")
    # Flags may stand between overrides, and a folder may have a name that needs quoting.
    line = ["method=mine", "-m", "seed=3", "--config-dir", "my", 'hydra.sweep.dir="a=b"', "device=cpu", "sweep.jobs=2"]
    ended = cli("ssl-train", *line, "hydra.searchpath=[]")
    assert (ended.code, ended.err) == (0, "")
    first, *rest = json.loads((tmp_path / "line.json").read_text())
    assert first == f"--config-dir={tmp_path / 'my'}"
    assert rest[:-1] == ["method=mine", "seed=3", "device=cpu", "hydra.searchpath=[]"]
    assert rest[-1].startswith(f'run_dir="{tmp_path}/a=b/mine_shapes_small_')


def test_a_yaml_may_hold_the_values_that_are_swept(quick_jobs: None, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "my/experiment").mkdir(parents=True)
    (tmp_path / "my/experiment/seeds.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 0,1\n      train.epochs: 1,2\n"
    )
    ended = cli("ssl-train", *HERE, "experiment=seeds", "--config-dir=my", "train.epochs=5")
    assert ended.code == 0
    rows = table(tmp_path / "here")
    assert sorted((row["seed"], row["train.epochs"]) for row in rows) == [("0", "5"), ("1", "5")]


def test_a_record_of_another_job_is_not_taken_for_ones_own(quick_jobs: None, cli: Cli, tmp_path: Path) -> None:
    line = ["ssl-train", *HERE, "seed=0,1"]
    assert cli(*line).code == 0
    path = next((tmp_path / "here/jobs").glob("*.json"))
    path.write_text(path.read_text().replace("seed=", "seed=7"))
    ended = cli(*line)
    assert ended.code == 2
    assert f"already has a job named {path.stem} with other overrides" in ended.err
    path.write_text("{}")
    ended = cli(*line)
    assert ended.code == 2
    assert f"{path} is damaged (" in ended.err


def test_a_table_that_cannot_be_written_is_told_in_one_line(
    quick_jobs: None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = _sweep_table.atomic.replace

    def full(path: Path, content: bytes) -> None:
        if path.name == "sweep.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(_sweep_table.atomic, "replace", full)
    ended = cli("ssl-train", *HERE, "seed=1")
    assert ended.code == 3
    (line,) = [line for line in ended.err.splitlines() if "sweep.csv" in line]
    assert line.startswith("ssl-train: ")
    assert "cannot be written (No space left on device)" in line


def test_a_metric_that_no_job_has_is_told(quick_jobs: None, cli: Cli) -> None:
    ended = cli("ssl-train", *HERE, "seed=0,1", "sweep.metric=health/rankme")
    assert ended.code == 0
    assert "no job has health/rankme" in ended.out


def test_evaluations_are_swept_too_and_made_again(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "note.py"
    script.write_text(
        "import sys\n"
        "open('lines', 'a').write(' '.join(sys.argv[1:]) + chr(10))\n"
        "sys.exit(3 * ('protocol=linear' in sys.argv))\n"
    )
    monkeypatch.setattr("sslcli.sweeps.sweep.program_of", lambda command: (sys.executable, str(script)))
    for _ in range(2):
        ended = cli("ssl-eval", "-m", "run=runs/one", "protocol=knn,linear", "hydra.sweep.dir=here")
        assert ended.code == 3
    assert sorted((tmp_path / "lines").read_text().splitlines()) == [
        *["run=runs/one protocol=knn"] * 2,
        *["run=runs/one protocol=linear"] * 2,
    ]
    assert {row["protocol"]: row["status"] for row in table(tmp_path / "here")} == {
        "knn": "finished",
        "linear": "failed",
    }


ORPHAN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
sys.stdin.read()
"""
CHILD = """
import os, signal, sys, time
os.environ["SSLCLI_SWEEP"] = str(os.getppid())
from sslcli.sweeps.job import stop_with_sweep
signal.signal(signal.SIGTERM, lambda number, frame: (open("saved", "w").close(), os._exit(75)))
stop_with_sweep()
open("ready", "w").close()
time.sleep(60)
"""


def test_a_job_saves_when_its_sweep_is_killed(tmp_path: Path) -> None:
    sweep = subprocess.Popen([sys.executable, "-c", ORPHAN, CHILD], cwd=tmp_path, stdin=subprocess.PIPE)
    _wait_for(tmp_path / "ready")
    sweep.kill()
    sweep.wait()
    _wait_for(tmp_path / "saved")


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.01)


def test_a_process_that_no_sweep_started_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSLCLI_SWEEP", raising=False)
    stop_with_sweep()


def test_a_fifo_in_the_place_of_a_record_is_named_before_anything_waits_for_it(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "sw/jobs").mkdir(parents=True)
    os.mkfifo(tmp_path / "sw/jobs/old.json")
    ended = cli("ssl-train", *SMALL, "--multirun", "seed=1", f"hydra.sweep.dir={tmp_path}/sw")
    assert ended.code == 2
    assert "old.json is a FIFO, but it must be a regular file: remove it" in ended.err
