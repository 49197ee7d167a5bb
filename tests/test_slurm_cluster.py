"""Runs on a disposable Slurm cluster of two nodes. Skipped only without root or the packages."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from small_runs import complete, differences, metrics, newest, start_warm, wait_for_step

CLUSTER = str(Path(__file__).parents[1] / "scripts" / "slurm" / "cluster.sh")
CANNOT_BE = 77
TINY = [
    "dataset=shapes",
    "dataset.limit=200",
    "dataset.test_images=10",
    "dataset.workers=0",
    "train.batch_size=16",
    "train.log_every_steps=1",
    "monitor.knn_every_epochs=0",
]
# MoCo that is slow until a file says otherwise, and writes down its node.
SLOW = """
import os
import time
from pathlib import Path

from sslcli.methods.moco import MoCo


class SlowMoCo(MoCo):
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        if "SLURM_JOB_ID" in os.environ:
            Path(f"rank{os.environ['RANK']}").write_text(os.uname().nodename)
            if not Path("hurry").exists():
                time.sleep(0.3)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the environment variables that the cluster needs."""
    folder = tmp_path_factory.mktemp("cluster")
    started = subprocess.run([CLUSTER, "start", str(folder)], capture_output=True, text=True)
    if started.returncode == CANNOT_BE:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([CLUSTER, "stop", str(folder)], check=True)


def go_there(given: tuple[Path, dict[str, str]]) -> None:
    os.chdir(given[0])
    os.environ |= given[1]


def ask(cluster: dict[str, str], *line: str) -> str:
    """Return the output of a command of Slurm."""
    return subprocess.run(line, env=os.environ | cluster, check=True, capture_output=True, text=True, timeout=60).stdout


def test_a_preempted_run_on_two_nodes_comes_back_and_ends_as_one_that_never_was(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    command = ["method=moco_v2", "method._target_=slow.SlowMoCo", "method.queue_size=64", "trust=[slow]", *TINY]
    command += ["train.max_steps=24", "train.save_every_epochs=0"]
    log, run_dir, other = tmp_path / "log", tmp_path / "run", tmp_path / "other"
    here: Any = {"prepare": go_there, "given": (tmp_path, cluster)}
    job = start_warm(
        *command,
        f"run_dir={run_dir}",
        "launcher=slurm",
        "launcher.nodes=2",
        "launcher.partition=low",
        "launcher.wait=true",
        log=log,
        **here,
    )
    two = ["launcher=multi", "launcher.processes=2"]
    complete(start_warm(*command, *two, f"run_dir={other}", log=tmp_path / "other.log", **here), tmp_path / "other.log")
    wait_for_step(job, run_dir, 4)
    assert f"another run (process {(run_dir / '.lock').read_text().split()[1]} on node1)" in refused_on_node2(
        cluster, run_dir
    )
    ask(cluster, "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    history = run_dir / "slurm" / "history.log"
    while "requeued" not in history.read_text():
        assert job.code is None, log.read_text()
        time.sleep(0.1)
    (tmp_path / "hurry").touch()
    complete(job, log)

    lines = [
        re.sub(r"after step \d+", "after step N", line.partition(": ")[2]) for line in history.read_text().splitlines()
    ]
    assert lines[1:] == [
        "starts on node[1-2]",
        "asked to stop by preemption",
        "stopped by signal SIGUSR1 after step N of 24 (preemption); requeued (1 times so far)",
        "starts on node[1-2]",
        "ended with exit code 0",
    ]
    assert "continuing from step" in log.read_text()
    assert {(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)} == {"node1", "node2"}
    assert differences(newest(run_dir), newest(other)) == []
    assert metrics(run_dir) == metrics(other)


def test_an_extension_that_is_queued_while_the_shorter_job_runs_loses_nothing(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    command = ["method=moco_v2", "method._target_=slow.SlowMoCo", "method.queue_size=64", "trust=[slow]", *TINY]
    log, run_dir, other = tmp_path / "log", tmp_path / "run", tmp_path / "other"
    slurm = [f"run_dir={run_dir}", "launcher=slurm", "launcher.processes_per_node=2", "launcher.partition=low"]
    here: Any = {"prepare": go_there, "given": (tmp_path, cluster)}
    shorter, longer = ([*command, f"train.max_steps={steps}"] for steps in (16, 24))
    for line in (shorter, longer):
        two = ["launcher=multi", "launcher.processes=2"]
        complete(
            start_warm(*line, *two, f"run_dir={other}", log=tmp_path / "other.log", **here), tmp_path / "other.log"
        )
    job = start_warm(*shorter, *slurm, "launcher.wait=true", log=log, **here)
    wait_for_step(job, run_dir, 4)
    complete(start_warm(*longer, *slurm, log=tmp_path / "log2", **here), tmp_path / "log2")
    first, second = re.findall(
        r"job (\d+) is RUNNING with a shorter length|job (\d+): ", (tmp_path / "log2").read_text()
    )
    assert ask(cluster, "squeue", "--noheader", f"--jobs={second[1]}", "--format=%T %r").split() == [
        "PENDING",
        "Dependency",
    ]
    ask(cluster, "scancel", "--signal=USR1", "--batch", first[0])  # as before a time limit
    history = run_dir / "slurm" / "history.log"
    while "requeued" not in history.read_text():
        assert job.code is None, log.read_text()
        time.sleep(0.1)
    (tmp_path / "hurry").touch()
    complete(job, log)  # the first job has read its own configuration again, and has trained to its own length
    assert "done: " in log.read_text()
    complete(start_warm(*longer, *slurm, "launcher.wait=true", log=tmp_path / "log3", **here), tmp_path / "log3")
    assert "extended from 16 to 24 steps" in (run_dir / "slurm" / f"{second[1]}.log").read_text()
    assert newest(run_dir)["step"] == 24
    assert differences(newest(run_dir), newest(other)) == []
    assert metrics(run_dir) == metrics(other)


def refused_on_node2(cluster: dict[str, str], run_dir: Path) -> str:
    """Return the message of a second run in the same directory on the other node."""
    code = f"from pathlib import Path; from sslcli.runs.directory import lock; lock(Path({str(run_dir)!r}), patience=0)"
    line = ["srun", "--nodelist=node2", sys.executable, "-c", code]
    ended = subprocess.run(line, env=os.environ | cluster, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    return ended.stderr


def test_one_job_of_a_sweep_of_six_may_fail(cluster: dict[str, str], tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "sweep"
    sweep = start_warm(
        "--multirun",
        *TINY,
        "train.max_steps=3",
        "launcher=slurm",
        "launcher.wait=true",
        "optimizer.lr=1,2,3,4,5,1e38",
        f"hydra.sweep.dir={folder}",
        log=log,
        prepare=go_there,
        given=(tmp_path, cluster),
    )
    assert sweep.finish() == 3, log.read_text()
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["status"], row["exit_code"]) for row in rows] == [("finished", "0")] * 5 + [("failed", "3")]
    assert float(rows[5]["optimizer.lr"]) == 1e38
    assert len(list(folder.glob("*/done"))) == 5
    assert len({path.read_text() for path in folder.glob("*/slurm/job")}) == 6


def test_an_evaluation_on_two_nodes_has_the_numbers_of_one_process(cluster: dict[str, str], tmp_path: Path) -> None:
    here: Any = {"cwd": tmp_path, "env": os.environ | cluster | {"OMP_NUM_THREADS": "1"}, "text": True, "timeout": 300}
    program = str(Path(sys.executable).with_name("ssl-eval"))
    log = tmp_path / "log"
    complete(start_warm(*TINY, "train.max_steps=2", f"run_dir={tmp_path / 'one'}", log=log), log)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    line = [program, "protocol=linear", "protocol.epochs=3", "launcher.threads=1"]
    subprocess.run([*line, "run=one"], check=True, capture_output=True, **here)
    slurm = ["launcher=slurm", "launcher.nodes=2", "launcher.processes_per_node=2", "launcher.wait=true"]
    output = subprocess.run([*line, "run=two", *slurm], check=True, stdout=subprocess.PIPE, **here).stdout
    assert output.count("│ linear (test)") == 1
    one, two = (json.loads((tmp_path / name / "eval/linear.json").read_text()) for name in ("one", "two"))
    assert {key: two[key] for key in two if key not in ("run", "checkpoint", "seconds")} == {
        key: one[key] for key in one if key not in ("run", "checkpoint", "seconds")
    }
    (folder,) = (tmp_path / "two" / "eval" / "slurm").iterdir()
    history = [line.partition(": ")[2] for line in (folder / "history.log").read_text().splitlines()]
    assert history[1:] == ["starts on node[1-2]", "ended with exit code 0"]
