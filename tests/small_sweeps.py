"""Sweeps whose jobs are processes without torch: the seed decides how a job ends; it writes the files of a run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from command_line import composed
from sslcli.config.settings import SweepSettings
from sslcli.config.yaml_files import as_yaml
from sslcli.sweeps.job import Job, Sweep
from sslcli.sweeps.sweep import prepare

# Seeds: 3 fails, 4 is killed, 5 waits for a signal and saves, 6 is refused; a second start of any of them finishes.
# Seed 7 waits for the file `go` in the folder of the sweep. A job copies the file configs/SEED.yaml of the working
# directory as its config.yaml, if there is one; see `write_configs`.
JOB = """
import json, os, pathlib, signal, sys, time

given = dict(part.partition("=")[::2] for part in sys.argv[1:])
run_dir = pathlib.Path(given["run_dir"].strip('"'))
checkpoints = run_dir / "checkpoints"
first = not run_dir.exists()
checkpoints.mkdir(parents=True, exist_ok=True)
seed = int(given.get("seed", 0))

def note(file, text):
    with (run_dir / file).open("a") as opened:
        opened.write(text)

def save(step):
    note("metrics.jsonl", json.dumps({"step": step, "monitor/knn_top1": seed / 10, "train/loss": 1.0 + seed}) + "\\n")
    (checkpoints / f"step-{step:08d}.pt").touch()

written = pathlib.Path("configs") / f"{seed}.yaml"
if written.exists():
    (run_dir / "config.yaml").write_text(written.read_text())
stopped = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: stopped.append(number))
cores = sorted(os.sched_getaffinity(0))
note("starts", json.dumps({"cores": cores, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "at": time.time()}) + "\\n")
if first and seed in (3, 4, 5):
    save(1)
if first and seed == 3:
    print("a loss that is not a number")
    sys.exit(3)
if first and seed == 4:
    os.kill(os.getpid(), signal.SIGKILL)
if first and seed == 5:
    until = time.monotonic() + 60
    while not stopped and time.monotonic() < until:
        time.sleep(0.01)
    sys.exit(75 if stopped else 1)
if seed == 7:
    until = time.monotonic() + 20
    while not (run_dir.parent / "go").exists() and time.monotonic() < until:
        time.sleep(0.01)
if first and seed == 6:
    sys.exit(2)
save(3)
note("ends", f"{time.time()}\\n")
(run_dir / "done").touch()
"""


SWEEP = """
import sys
from sslcli.cli import train
from sslcli.sweeps import sweep

job = sys.argv.pop(1)
sweep.program_of = lambda command: (sys.executable, "-S", job)
train.main()
"""


def write_configs(folder: Path, seeds: range, *overrides: str) -> None:
    """Write the configurations that the jobs with these seeds copy into their run directories."""
    (folder / "configs").mkdir(exist_ok=True)
    for seed in seeds:
        config = composed("train", "device=cpu", f"seed={seed}", *overrides)
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        (folder / f"configs/{seed}.yaml").write_text(as_yaml(values | {"effective": {"steps": 3}}))


def signal_when_started(number: int, folder: Path, *, starts: int) -> None:
    """Send this process a signal, from another thread, once `starts` jobs below a folder were started."""
    test = threading.current_thread()

    def send() -> None:
        while sum(len(path.read_text().splitlines()) for path in folder.glob("*/starts")) < starts:
            if not test.is_alive():
                return
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def start_sweep(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    """Start `ssl-train ARGUMENTS` with quick jobs in a separate process, which can be killed."""
    (cwd / "job.py").write_text(JOB)
    line = [sys.executable, "-c", SWEEP, str(cwd / "job.py"), *arguments]
    return subprocess.Popen(line, cwd=cwd, stdout=subprocess.DEVNULL)


def wait_until(there: Callable[[], bool], what: str) -> None:
    """Return once the condition is true."""
    until = time.monotonic() + 60
    while not there():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.01)


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of sweep.csv."""
    with (folder / "sweep.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(folder: Path, key: str) -> dict[str, str]:
    """A column of sweep.csv by seed."""
    return {row["seed"]: row[key] for row in table(folder)}


def prepared_sweep(folder: Path) -> tuple[Sweep, Job]:
    """A sweep with one job that nobody has started."""
    settings = SweepSettings(metric="train/loss", direction="auto", jobs=None, retry_failed=False)
    sweep = Sweep(command="train", program=(), folder=folder, settings=settings, flags=(), shared=())
    job = Job("one", ("seed=1",), folder / "one")
    prepare(sweep, [job])
    return sweep, job
