"""Checks of a checkpoint before a run resumes from it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from one_run import finish, make_run
from sslcli.engine import checkpoint
from sslcli.engine.resume import resume
from sslcli.engine.run import Run
from sslcli.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with checkpoints after 2, 3 (the end of an epoch) and 4 steps."""
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
    path.with_suffix(".sha256").unlink(missing_ok=True)


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


DAMAGES: dict[str, Any] = {
    "no monitor": {"monitor": None},
    "no processes": {"processes": None},
    "processes of no process": {"processes": []},
    "a number for the method": {"method": 3},
    "generators": {"processes": [{"rng": {}, "metric_means": {"sums": {}, "count": 0}}]},
    "means": {"processes": [{"rng": {"cpu": torch.zeros(1)}, "metric_means": {"sums": {"loss": 1}, "count": 0}}]},
    "detector": {"monitor": {"detector": {}, "wall": 1.0}},
    "wall": {"monitor": {"detector": {}, "wall": "long"}},
    "optimizer": {"optimizer": {"state": []}},
    "schema": {"schema": "new"},
    "an old schema without its fields": {"schema": 2},
    "environment": {"environment": "torch"},
    "phases": {"phases": [{"start": 0, "total": 4}]},
    "phases in the wrong order": {"phases": [{"start": 3, "total": 4, "extend": "decay"}]},
    "configuration": {"config": 3},
}


@pytest.mark.parametrize("changes", DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_without_the_fields_of_one_is_damaged(
    changes: dict[str, Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    rewrite(checkpoint.path_of(run_dir, 4), **changes)
    run = small_run(run_dir)
    warnings: list[str] = []
    run.screen.warn = warnings.append  # type: ignore[method-assign, assignment]
    finish(run)
    assert [line for line in warnings if "step-00000004.pt" in line and "Falling back" in line]
    assert torch.load(checkpoint.path_of(run_dir, 4), weights_only=True).keys() >= {"monitor", "processes"}


def test_weights_that_are_not_finite_are_damage_and_never_the_last_good_checkpoint(
    trained: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    path = checkpoint.path_of(run_dir, 4)
    method = torch.load(path, weights_only=True)["method"]
    broken = next(name for name, value in method.items() if name.endswith("weight"))
    rewrite(path, method=method | {broken: method[broken] * math.nan})
    run = small_run(run_dir)
    assert resume(run) == 3
    assert f"the last good checkpoint is {checkpoint.path_of(run_dir, 3)}." in run.monitor.remedy()
    run.stop.close()
    for step in (2, 3):
        rewrite(checkpoint.path_of(run_dir, step), method={name: value * math.nan for name, value in method.items()})
    with pytest.raises(ConfigError, match=r"none of the 3 checkpoints .* can be used"):
        resume(run)
