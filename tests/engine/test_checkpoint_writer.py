"""Writing of checkpoints by all processes of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from processes import Pair
from sslcli.engine.checkpoint_writer import Writer
from sslcli.errors import TrainingFailed

STATE = {"method": {}, "optimizer": {"state": {}, "param_groups": []}}


def saved_after(run_dir: Path, change: str, sharded: bool) -> str:
    """Save, change the run directory, and save again. Return the message of the error of the second save."""
    writer = Writer(run_dir, sharded=sharded)
    writer.save({"step": 1, **STATE}, keep=3)
    writer.wait()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if change != "nothing" and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
        if change == "moved":
            run_dir.rename(run_dir.with_name("moved"))
        else:
            shutil.rmtree(run_dir)
        if change == "replaced":
            run_dir.mkdir()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    try:
        writer.save({"step": 2, **STATE}, keep=3)
        writer.close()
    except TrainingFailed as error:
        return str(error)
    return ""


@pytest.mark.parametrize("change", ["deleted", "moved", "replaced"])
def test_a_run_writes_nothing_where_its_directory_was(change: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert f"the run directory {run_dir} was deleted" in saved_after(run_dir, change, False)
    assert not list(run_dir.glob("*"))


def test_a_run_whose_directory_stays_writes_on(tmp_path: Path) -> None:
    assert saved_after(tmp_path, "nothing", False) == ""
    assert (tmp_path / "checkpoints/step-00000002.pt").exists()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_all_processes_raise_the_same_error(change: str, sharded: bool, tmp_path: Path, pair: Pair) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for message in pair.run(saved_after, run_dir, change, sharded):
        assert f"the run directory {run_dir} was deleted" in message
    assert not list(run_dir.glob("*"))
