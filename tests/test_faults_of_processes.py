"""Faults in one of several processes: all end soon, by themselves, with one message that names the process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from small_runs import Started, complete, last_step, make_folder, metrics, start_ranks, wait_for_step
from sslcli.engine import loop
from sslcli.engine.run import Run
from sslcli.methods.base import Batch
from sslcli.runs import agreement

SMALL = [
    "backbone.width=4",
    "dataset.limit=256",
    "train.batch_size=16",
    "train.max_steps=20",
    "train.save_every_steps=2",
    "train.log_every_steps=1",
    "monitor.knn_every_epochs=0",
    "monitor.health_every_steps=0",
    "monitor.pictures=0",
]


def finish(ranks: list[Started]) -> list[int]:
    return [process.finish() for process in ranks]


class AtStep:
    """Return `optimize` with an action before its nth call."""

    def __init__(self, nth: int) -> None:
        self.real, self.left = loop.optimize, nth

    def __call__(self, run: Run, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        self.left -= 1
        scalars = self.real(run, model, batches) if self.left else self.fail(run, model, batches)
        return scalars

    def fail(self, *args: Any) -> dict[str, Tensor]:
        raise NotImplementedError


class Stuck(AtStep):
    def fail(self, *args: Any) -> dict[str, Tensor]:
        time.sleep(1000)
        return {}


class NaN(AtStep):
    def fail(self, *args: Any) -> dict[str, Tensor]:
        return {name: torch.full_like(value, torch.nan) for name, value in self.real(*args).items()}


def stuck_in_the_fifth_step(rank: int) -> None:
    if rank == 1:
        loop.optimize = Stuck(5)


def test_a_process_that_hangs_is_named_at_the_time_limit(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(*SMALL, "launcher.timeout=12s", f"run_dir={run_dir}", log=log, prepare=stuck_in_the_fifth_step)
    stuck = ranks[1].pid
    wait_for_step(ranks[0], run_dir, 4)
    seen = time.monotonic()
    assert finish(ranks) == [3, 3]
    assert time.monotonic() - seen < 90
    for output in (log.read_text(), (run_dir / "console.log").read_text()):
        assert output.count("the other processes waited 12 s (launcher.timeout) for") == 1
        assert f"(launcher.timeout) for process 1 (id {stuck} on {os.uname().nodename}, at step 5)" in output
    assert "Traceback" not in log.read_text()
    complete_both(start_ranks(*SMALL, f"run_dir={run_dir}", log=log), log)
    assert "continuing from step 4" in log.read_text()
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 21))


def never_join(rank: int) -> None:
    dist.init_process_group = lambda *args, **kwargs: time.sleep(1000)


def test_processes_that_do_not_reach_each_other_end_at_the_time_limit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*SMALL, "launcher.timeout=8s", f"run_dir={tmp_path / 'run'}"]
    assert finish(start_ranks(*command, log=log, prepare=never_join)) == [3, 3]
    assert log.read_text().count("they cannot reach each other over the network, or a device hangs") == 1


def complete_both(ranks: list[Started], log: Path) -> None:
    for process in ranks:
        complete(process, log)


def test_a_stopped_process_is_named_and_one_that_goes_on_in_time_does_no_harm(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(*SMALL, "train.max_steps=4000", "launcher.timeout=12s", f"run_dir={run_dir}", log=log)
    wait_for_step(ranks[0], run_dir, 4)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    time.sleep(3)
    before = last_step(run_dir)
    os.kill(ranks[1].pid, signal.SIGCONT)
    wait_for_step(ranks[0], run_dir, before + 2)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        assert ranks[0].finish() == 3
    finally:
        os.kill(ranks[1].pid, signal.SIGKILL)
    output = log.read_text()
    assert f"process 1 (id {ranks[1].pid} on " in output
    assert "it does not answer: it is stopped, or its machine has failed" in output


def test_a_process_with_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks = start_ranks(
        *SMALL, f"run_dir={tmp_path / 'run'}", log=log, other=("optimizer.lr=0.5", "train.save_every_steps=3")
    )
    assert finish(ranks) == [2, 2]
    output = log.read_text()
    assert (
        f"process 1 (on {os.uname().nodename}) differs from process 0 (on {os.uname().nodename}); "
        "what differs: optimizer.lr: 0.03 -> 0.5; train.save_every_steps: 2 -> 3. Start all with the same command"
    ) in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def install_other_code(rank: int) -> None:
    """One file of the package is another one on the second process, as is the version of torch."""
    real, versions = agreement.source_files, agreement.version
    if rank == 1:
        agreement.source_files = lambda packages: [
            (Path(__file__) if name == "sslcli/engine/loop.py" else path, name) for path, name in real(packages)
        ]
        agreement.version = lambda name: "1.0" if name == "torch" else versions(name)


def test_a_process_with_other_code_is_refused_with_the_files_that_differ(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert finish(start_ranks(*SMALL, f"run_dir={tmp_path / 'run'}", log=log, prepare=install_other_code)) == [2, 2]
    differing = log.read_text().partition("what differs: ")[2].partition(". Start all")[0].split("; ")
    assert [line.partition(": ")[0] for line in differing] == ["file sslcli/engine/loop.py", "version of torch"]
    assert differing[1].endswith(" -> 1.0")


def nan_in_the_third_step(rank: int) -> None:
    if rank == 1:
        loop.optimize = NaN(3)


def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(*SMALL, "train.log_every_steps=5", f"run_dir={run_dir}", log=log, prepare=nan_in_the_third_step)
    assert finish(ranks) == [3, 3]
    output = (run_dir / "console.log").read_text()
    assert "the loss is not finite since step 3 (" in output
    assert "step-00000002.pt" in output
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("*.pt")) == ["step-00000002.pt"]


def test_an_image_that_one_process_cannot_read_stops_all_with_its_path(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", broken=1)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [*SMALL, "dataset=folder", f"dataset.root={images}", "dataset.image_size=16", "dataset.workers=0"]
    start = time.monotonic()
    codes = finish(start_ranks(*command, "dataset.val_fraction=0", f"run_dir={run_dir}", log=log))
    assert 2 in codes
    assert 0 not in codes
    assert time.monotonic() - start < 60
    output = log.read_text()
    assert "1 of 60 images cannot be read, but dataset.max_bad=0.01 allows 0" in output
    assert str(images / "a" / "000.png") in output
    assert "Traceback" not in output
