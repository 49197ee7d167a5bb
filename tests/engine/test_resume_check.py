"""Checks of a checkpoint before a run resumes from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from one_run import finish, make_run
from sslcli.engine import checkpoint
from sslcli.engine.run import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with checkpoints after 2 and 4 steps."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    finish(small_run(run_dir))
    return run_dir


def small_run(run_dir: Path, *overrides: str) -> Run:
    return make_run(
        run_dir, "train.max_steps=4", "train.save_every_steps=2", "monitor.health_every_steps=0", *overrides
    )


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of a checkpoint. A field that is changed to None is removed."""
    state = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    path.with_suffix(".sha256").unlink()


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [(["seed=7", "optimizer.lr=0.3"], "optimizer.lr: 0.3 -> .*; seed: 7 -> 0"), (["method=byol"], "method._target_")],
    ids=["values", "method"],
)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_is_named(
    overrides: list[str], difference: str, trained: Path, tmp_path: Path
) -> None:
    finish(small_run(tmp_path / "other", *overrides))
    run_dir = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    for old in checkpoint.folder(run_dir).glob("step-00000004*"):
        old.unlink()
    for foreign in checkpoint.folder(tmp_path / "other").glob("step-00000004*"):
        shutil.copy(foreign, checkpoint.folder(run_dir))
    with pytest.raises(checkpoint.RefusedCheckpoint, match=rf"step-00000004\.pt is .*what differs: .*{difference}"):
        finish(small_run(run_dir))


def test_settings_that_may_differ_are_not_compared(trained: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    run = small_run(run_dir, "train.max_steps=6")
    with pytest.raises(checkpoint.RefusedCheckpoint, match=r"train\.max_steps: 4 -> 6"):
        finish(run)
    run = small_run(run_dir, "train.max_steps=6")
    run.may_differ = ("train.max_steps",)
    finish(run)
    assert checkpoint.step_of(checkpoint.all_of(run_dir)[-1]) == 6


def test_a_checkpoint_without_configuration_or_with_old_names_resumes(trained: Path, tmp_path: Path) -> None:
    for config in (None, old_names(torch.load(checkpoint.path_of(trained, 4), weights_only=True)["config"])):
        run_dir = shutil.copytree(trained, tmp_path / str(config is None), symlinks=True)
        rewrite(checkpoint.path_of(run_dir, 4), config=config)
        finish(small_run(run_dir))
        assert checkpoint.step_of(checkpoint.all_of(run_dir)[-1]) == 4


def old_names(config: dict[str, Any]) -> dict[str, Any]:
    train = dict(config["train"])
    train["log_every"] = train.pop("log_every_steps")
    return config | {"train": train}
