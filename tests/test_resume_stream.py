"""Runs over shards that are killed and resumed: every image once per epoch, and a bit-identical end.

The method of these runs counts, in a buffer that the checkpoints hold, how often it sees each image in each epoch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from small_runs import Started, complete, differences, family, metrics, newest, start_warm, survivors, wait_for_step
from small_shards import write_parquet, write_tar

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the runs of all

EPOCHS, STEPS_PER_EPOCH, BATCH, HELD_OUT = 4, 6, 8, 16
COUNTING = '''
import torch
from sslcli.distributed.collectives import all_gather
from sslcli.methods.simclr import nt_xent
from sslcli.methods.base import Method


class Counting(Method):
    """SimCLR without a head, and a count of the images it sees."""

    num_views = 2

    def __init__(self, backbone, *, num_images: int, epochs: int) -> None:
        super().__init__(backbone)
        self.register_buffer("seen", torch.zeros(epochs, num_images, dtype=torch.int64))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    def forward(self, batch):
        index = all_gather(batch.index)
        self.seen[self.images // self.seen.shape[1]].index_add_(0, index, torch.ones_like(index))
        self.images += len(index)
        return {"loss": nt_xent(*map(self.backbone, batch.views), temperature=0.5).loss}
'''
YAML = f"""
# @package _global_
defaults:
  - override /views: simclr
about: {{title: Counting, year: 2020, paper: none, family: test, needs: [], published: none}}
method:
  _target_: counting.Counting
  epochs: {EPOCHS}
"""


class Runs:
    """The runs of this file, two at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "conf" / "method").mkdir(parents=True)
        (folder / "conf" / "method" / "counting.yaml").write_text(YAML)
        (folder / "counting.py").write_text(COUNTING)
        first = 0
        for number, size in enumerate((13, 20, 7, 24)):
            plain = partial(write_parquet, features=False)  # class numbers alone, as in the archives
            write, kind = ((write_tar, "tar"), (plain, "parquet"))[number % 2]
            write(folder / "shards" / f"{number}.{kind}", range(first, first + size))
            first += size
        self.pool = ThreadPoolExecutor(2)
        self.futures: dict[tuple[str, int], Future[Path]] = {}
        for processes in (1, 2):
            self.futures["killed", processes] = self.pool.submit(self.killed, processes)
            self.futures["whole", processes] = self.pool.submit(self.whole, processes)

    def __call__(self, kind: str, processes: int) -> Path:
        """The directory of a finished run."""
        return self.futures[kind, processes].result()

    def start(self, run_dir: Path, processes: int, *, workers: int) -> Started:
        """`ssl-train` in the folder of the method."""
        arguments = [
            "--config-dir=conf",
            "method=counting",
            "trust=[counting]",
            "backbone.width=4",
            "backbone.norm=layer",
            "train.precision=fp32",
            "dataset=hf_stream",
            "dataset.path=shards",
            f"dataset.cache={run_dir}.cache",
            f"dataset.workers={workers}",
            "dataset.lanes=4",
            "dataset.buffer=16",
            "dataset.image_size=16",
            "dataset.val_fraction=0.25",
            "dataset.pretrain_on_val=false",
            f"train.batch_size={BATCH}",
            f"train.epochs={EPOCHS}",
            "train.save_every_steps=3",
            "train.log_every_steps=2",
            "monitor.pictures=0",
            f"run_dir={run_dir}",
        ]
        if processes > 1:
            arguments += ["launcher=multi", f"launcher.processes={processes}"]
        return start_warm(*arguments, log=log_of(run_dir), prepare=os.chdir, given=str(self.folder))

    def whole(self, processes: int) -> Path:
        """Never stopped."""
        run_dir = self.folder / f"whole-{processes}"
        complete(self.start(run_dir, processes, workers=2 * (processes - 1)), log_of(run_dir))
        return run_dir

    def killed(self, processes: int) -> Path:
        """Killed within epochs, each start with another number of workers."""
        run_dir = self.folder / f"killed-{processes}"
        for number, step in enumerate((2, 8, 15) if processes == 1 else (8,)):
            process = self.start(run_dir, processes, workers=2 * (1 - number % 2))
            wait_for_step(process, run_dir, step)
            children = family(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            assert survivors(children, within=5) == []
            assert process.finish() == -signal.SIGKILL
        complete(self.start(run_dir, processes, workers=0), log_of(run_dir))
        return run_dir


def log_of(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("stream"))
    yield runs
    runs.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_sees_every_image_once_an_epoch(runs: Runs, processes: int) -> None:
    seen = newest(runs("killed", processes))["method"]["seen"]
    assert torch.equal(seen, torch.ones(EPOCHS, BATCH * STEPS_PER_EPOCH, dtype=torch.int64))
    assert "continuing from step" in log_of(runs("killed", processes)).read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_ends_as_one_never_stopped(runs: Runs, processes: int) -> None:
    whole, killed = runs("whole", processes), runs("killed", processes)
    assert newest(whole)["step"] == EPOCHS * STEPS_PER_EPOCH
    assert differences(newest(killed), newest(whole)) == []
    assert metrics(killed) == metrics(whole)
    assert len([line for line in metrics(whole) if "monitor/knn_top1" in line]) == EPOCHS


def test_two_processes_see_the_batches_of_one(runs: Runs) -> None:
    one, two = metrics(runs("whole", 1)), metrics(runs("whole", 2))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for line, other in zip(one, two, strict=True):
        assert other.get("train/loss", 0) == pytest.approx(line.get("train/loss", 0), rel=1e-4)


def test_the_checkpoint_tells_where_the_loader_was(runs: Runs) -> None:
    path = runs("whole", 1) / "checkpoints" / f"step-{21:08}.pt"
    position = torch.load(path, weights_only=True)["loader"]
    images = BATCH * STEPS_PER_EPOCH
    assert position | {"shards": ""} == {"epoch": 3, "image": 3 * BATCH, "images": images, "shards": ""}
    assert len(position["shards"]) == 16


def test_other_shards_than_the_run_began_with_are_refused(runs: Runs) -> None:
    run_dir = runs("whole", 1)
    (run_dir / "done").unlink()
    for path in sorted((run_dir / "checkpoints").glob("step-*"))[-2:]:
        path.unlink()
    path = runs.folder / "shards" / "2.tar"
    path.write_bytes(write_tar(runs.folder / "more.tar", range(50)).read_bytes())
    assert runs.start(run_dir, 1, workers=0).finish() == 2
    output = log_of(run_dir).read_text()
    assert "of 4 shards, 1 changed in label, size or contents (2.tar). Restore them, or start another run" in output
    (run_dir / "images.npz").unlink()  # as in a run of an older version
    assert runs.start(run_dir, 1, workers=0).finish() == 2
    output = log_of(run_dir).read_text()
    assert "are not those that the run began with (48 then, 80 now), so it cannot resume" in output
    assert "at image 24 of epoch 3: restore the images" in output
