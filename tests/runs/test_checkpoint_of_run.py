"""The checkpoint of a run that is evaluated or exported."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from sslcli.engine import checkpoint
from sslcli.errors import ConfigError
from sslcli.runs import directory
from sslcli.runs.checkpoint_of_run import find_checkpoint, load_checkpoint, type_name
from sslcli.system import atomic


def test_a_checkpoint_is_found_by_its_step_or_as_the_last(run_dir: Path) -> None:
    assert find_checkpoint(run_dir, 3) == find_checkpoint(run_dir, "last")
    with pytest.raises(ConfigError, match=r"checkpoint is 2, .*: 3$"):
        find_checkpoint(run_dir, 2)


def test_the_last_checkpoint_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (100, 9, 20):
        (tmp_path / "checkpoints" / f"step-{step:08d}.pt").touch()
    assert find_checkpoint(tmp_path, "last").name == "step-00000100.pt"
    assert find_checkpoint(tmp_path, 9).name == "step-00000009.pt"


def test_a_directory_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint is 'last', .*: none$"):
        find_checkpoint(tmp_path, "last")


def test_the_name_of_an_image_set_is_known_without_building_it() -> None:
    assert type_name({"_target_": "sslcli.data.sources.base.TorchvisionSet", "name": "CIFAR10"}) == "CIFAR10"
    assert type_name({"_target_": "sslcli.data.sources.base.Shapes", "name": None}) == "shapes"


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_checkpoint_that_is_deleted_while_it_is_opened_is_followed_by_the_newest(
    is_sharded: bool, tmp_path: Path
) -> None:
    """A thread replaces the only checkpoint as fast as it can, as a run with train.keep=1 does."""
    saved, stop = {"seed": 0, "method": {"_target_": "x"}}, threading.Event()
    old = tmp_path / "old.pt"
    torch.save({"schema": 3, "step": 1, "method": {"weight": torch.zeros(9)}, "config": saved}, old)

    def rotate() -> None:
        for step in itertools.count(1):
            if is_sharded:
                replace_folder(tmp_path, step)
            else:
                checkpoint.save(tmp_path, {"step": step, "method": {"weight": torch.full((9,), step)}}, keep=1)
            if stop.is_set():
                return

    thread = threading.Thread(target=rotate)
    thread.start()
    try:
        while not checkpoint.all_of(tmp_path):
            pass
        with directory.lock(tmp_path):
            for _ in range(40):
                loaded = load_checkpoint(tmp_path, "last", saved)
                assert int(loaded.weights["weight"][0]) == loaded.step
    finally:
        stop.set()
        thread.join()


def replace_folder(run_dir: Path, step: int) -> None:
    """Replace the only checkpoint by a sharded one, as `Writer` does on one process."""
    path = checkpoint.path_of(run_dir, step).with_suffix("")
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.mkdir()
    tensor = torch.full((9,), step)
    dcp.save({"method/weight": tensor}, storage_writer=FileSystemWriter(temporary), no_dist=True)
    rest = {"state": {"schema": 3, "step": step}, "places": {"method/weight": ("method", "weight")}}
    torch.save(rest, temporary / "rest.pt")
    sums = "".join(f"{atomic.sha256(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
    (temporary / "SHA256SUMS").write_text(sums)
    checkpoint.publish(temporary, path)
    checkpoint.prune(path, keep=1)


def test_a_checkpoint_that_does_not_exist_is_refused_at_once_if_no_run_is_at_work(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"step": 3, "method": {}}, keep=1)
    with pytest.raises(ConfigError, match="has checkpoints of the steps: 3"):
        load_checkpoint(tmp_path, 2, {})
    checkpoint.path_of(tmp_path, 3).write_bytes(b"")
    with pytest.raises(ConfigError, match="does not match its checksum"):
        load_checkpoint(tmp_path, "last", {})


def test_a_checkpoint_of_another_run_is_not_evaluated(tmp_path: Path) -> None:
    saved = {"seed": 0, "method": {"_target_": "x"}, "train": {"epochs": 20}}
    checkpoint.save(tmp_path, {"step": 3, "method": {}, "config": saved | {"seed": 1}}, keep=1)
    with pytest.raises(ConfigError, match="what differs: seed: 1 -> 0"):
        load_checkpoint(tmp_path, "last", saved)
    checkpoint.save(tmp_path, {"step": 4, "method": {}, "config": saved | {"train": {"epochs": 10}}}, keep=1)
    assert load_checkpoint(tmp_path, "last", saved).step == 4
