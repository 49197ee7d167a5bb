"""A run that is killed and resumed ends bit-identical to one that was never stopped."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from small_runs import (
    Started,
    complete,
    differences,
    family,
    last_step,
    make_folder,
    metrics,
    newest,
    start,
    start_warm,
    survivors,
    wait_for_step,
)
from sslcli.engine import resume as resume_module

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the runs of all

STEPS = 32
COMMON = [
    "backbone.width=4",
    "dataset=folder",
    "dataset.image_size=16",
    "dataset.max_bad=0.1",
    "train.batch_size=8",
    f"train.max_steps={STEPS}",
    "train.save_every_steps=3",
    "train.log_every_steps=2",  # so that checkpoints also hold unfinished means
    "monitor.health_every_steps=5",
    "monitor.pictures=2",
    "seed=3",
]
METHODS = {
    # Where the processor multiplies bfloat16, whose rounding depends on the split of a batch, byol has it.
    "moco_v2": ["method.queue_size=50", "train.precision=fp32"],
    "byol": ["method.hidden=16", "method.dim=8"],
}
TWO = ["launcher=multi", "launcher.processes=2"]

Killer = Callable[[Started, Path], None]


class Runs:
    """The runs of this file, two at a time, so that they share the machine while the tests wait for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = make_folder(folder / "images")
        self.pool = ThreadPoolExecutor(2)
        self.futures: dict[tuple[str, ...], Future[Path]] = {}
        for method in METHODS:
            self.begin("killed", method, 1)
            self.begin("reference", method, 1)
        self.begin("killed", "moco_v2", 2)
        self.begin("reference", "moco_v2", 2)
        self.begin("torchrun", "byol", 2)
        self.begin("killed", "byol", 2)
        self.begin("grown", "moco_v2", 2)

    def begin(self, kind: str, method: str, processes: int) -> None:
        run_dir = self.folder / f"{kind}-{method}-{processes}"
        command = [f"method={method}", *METHODS[method], *COMMON, f"dataset.root={self.images}", f"run_dir={run_dir}"]
        run = {"killed": killed, "reference": reference, "grown": grown, "torchrun": torchrun}[kind]
        self.futures[kind, method, str(processes)] = self.pool.submit(run, command, run_dir, processes)

    def __call__(self, kind: str, method: str, processes: int) -> Path:
        """The directory of a finished run."""
        return self.futures[kind, method, str(processes)].result()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("resume"))
    yield runs
    runs.pool.shutdown(cancel_futures=True)


def log_of(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")


def reference(command: list[str], run_dir: Path, processes: int) -> Path:
    """Never stopped; files are read by the main process on one process, and by workers on two."""
    launcher = ["dataset.workers=0"] if processes == 1 else [*TWO, "dataset.workers=2"]
    complete(start_warm(*command, *launcher, log=log_of(run_dir)), log_of(run_dir))
    return run_dir


def killed(command: list[str], run_dir: Path, processes: int) -> Path:
    """Stopped several times; each start has another number of workers."""
    chance = random.Random(run_dir.name)
    early, *steps = sorted(chance.sample(range(2, STEPS - 12), 4))
    killers: list[Killer] = [partial(kill_main, step=early)]
    launcher = [] if processes == 1 else TWO
    if processes == 1:
        killers += [partial(kill_main, step=step) for step in steps]
        killers.insert(2, kill_itself)
    elif "moco" in run_dir.name:
        killers = [partial(restart, steps=steps[:2]), partial(kill_a_rank, step=steps[-1])]
    log = log_of(run_dir)
    for number, kill in enumerate(killers):
        prepare, given = (die_while_saving, last_step(run_dir)) if kill is kill_itself else (None, None)
        options = [f"dataset.workers={2 * (number % 2)}"]
        if launcher:
            options += ["launcher.max_restarts=" + ("0" if number else "2")]
        kill(start_warm(*command, *launcher, *options, log=log, prepare=prepare, given=given), run_dir)
    complete(start_warm(*command, *launcher, "dataset.workers=2", log=log), log)
    return run_dir


def kill_main(process: Started, run_dir: Path, *, step: int) -> None:
    """Send SIGKILL to the process that the user started; its children must end with it and release the lock."""
    wait_for_step(process, run_dir, step)
    children = family(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert survivors(children, within=5) == []
    assert process.finish() == -signal.SIGKILL


def kill_itself(process: Started, run_dir: Path) -> None:
    """The process is killed inside a checkpoint write."""
    assert process.finish() == -signal.SIGKILL
    assert list((run_dir / "checkpoints").glob("*.tmp"))


def die_while_saving(step: int) -> None:
    """Send SIGKILL when half of the first checkpoint at or after `step` is written."""
    whole = torch.save

    def torn(state: dict[str, Any], path: Path) -> None:
        whole(state, path)
        if state["step"] >= step:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = torn


def restart(process: Started, run_dir: Path, *, steps: list[int]) -> None:
    """SIGKILL to one of several processes: all start again by themselves, and are then stopped."""
    children = kill_one(process, run_dir, step=steps[0])
    assert survivors(children, within=30) == []
    wait_for_step(process, run_dir, max(steps[1], last_step(run_dir) + 1))
    output = log_of(run_dir).read_text(), (run_dir / "console.log").read_text()
    for text in output:
        assert "was ended by SIGKILL; all start again from the last checkpoint (restart 1 of 2)" in text
        assert "continuing from step" in text.partition("restart 1 of 2")[2]
    terminate(process, run_dir)


def kill_a_rank(process: Started, run_dir: Path, *, step: int) -> None:
    """SIGKILL to one of several processes that are not to start again."""
    children = kill_one(process, run_dir, step=step)
    assert process.finish() == 3
    assert "was ended by SIGKILL. The usual cause of SIGKILL is too little memory" in log_of(run_dir).read_text()
    assert survivors(children, within=5) == []


def kill_one(process: Started, run_dir: Path, *, step: int) -> list[int]:
    """SIGKILL to one of several processes while a checkpoint is written, or about to be; all that were at work."""
    wait_for_step(process, run_dir, step)
    until = time.monotonic() + 60
    while not list((run_dir / "checkpoints").glob("*.tmp")) and time.monotonic() < until:
        pass
    children = family(process.pid)
    os.kill(children[step % 2], signal.SIGKILL)
    return children


def terminate(process: Started, run_dir: Path) -> None:
    """SIGTERM to the whole process group, as schedulers send it: saved within two steps, exit code 75."""
    wait_for_step(process, run_dir, last_step(run_dir) + 2)
    os.killpg(process.pid, signal.SIGTERM)
    seen = last_step(run_dir)
    assert process.finish() == 75
    assert seen <= newest(run_dir)["step"] <= seen + 4  # two steps, and two that had no line yet


def grown(command: list[str], run_dir: Path, processes: int) -> Path:
    """Stopped by the time limit on one process, continued on two."""
    command, log = [*command, "dataset.workers=0"], log_of(run_dir)
    assert start(*command, "train.max_time=0.01", log=log).finish() == 75
    assert newest(run_dir)["step"] == 1
    complete(start(*command, *TWO, log=log), log)
    return run_dir


def torchrun(command: list[str], run_dir: Path, processes: int) -> Path:
    """Started by torch's own launcher, and never stopped."""
    program = (sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone")
    log = log_of(run_dir)
    complete(start("-m", "sslcli.cli.train", *command, program=program, log=log), log)
    return run_dir


@pytest.mark.parametrize(
    ("method", "processes", "whole_kind"),
    [("moco_v2", 1, "reference"), ("byol", 1, "reference"), ("moco_v2", 2, "reference"), ("byol", 2, "torchrun")],
)
def test_a_killed_run_ends_as_one_never_stopped(runs: Runs, method: str, processes: int, whole_kind: str) -> None:
    whole, resumed = runs(whole_kind, method, processes), runs("killed", method, processes)
    assert newest(whole)["step"] == STEPS
    assert differences(newest(resumed), newest(whole)) == []
    assert metrics(resumed) == metrics(whole)
    assert (resumed / "done").exists()


def test_every_step_has_its_line_once(runs: Runs) -> None:
    steps = [line["step"] for line in metrics(runs("killed", "moco_v2", 1)) if "train/loss" in line]
    assert steps == list(range(2, STEPS + 1, 2))


def test_nothing_is_left_lying_about(runs: Runs) -> None:
    run_dir = runs("killed", "byol", 1)
    assert not list(run_dir.rglob("*.tmp"))
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    steps = [STEPS - 4, STEPS - 2, STEPS]
    assert names == ["last", *(f"step-{step:08d}.{end}" for step in steps for end in ("pt", "sha256"))]


def test_two_processes_go_on_where_one_stopped_with_the_same_images(runs: Runs) -> None:
    whole, continued = metrics(runs("reference", "moco_v2", 1)), metrics(runs("grown", "moco_v2", 2))
    assert [line["step"] for line in continued] == [line["step"] for line in whole]
    for one, other in zip(whole, continued, strict=True):
        assert ("train/loss" in other) == ("train/loss" in one)
        assert other.get("train/lr") == one.get("train/lr")
        assert other.get("train/loss", 0) == pytest.approx(one.get("train/loss", 0), rel=1e-4)


def test_the_kind_of_kernels_of_an_older_checkpoint_is_that_of_its_settings() -> None:
    for settings, expected in (({}, (True, False)), ({"deterministic": False, "compile": True}, (False, True))):
        found = resume_module._stored_environment({"config": {"train": settings}, "environment": {"threads": 2}})
        assert (found["deterministic kernels"], found["torch.compile"], found["threads"]) == (*expected, 2)
    state = {"config": {"train": {"compile": False}}, "environment": {"torch.compile": True}}
    assert resume_module._stored_environment(state)["torch.compile"]
