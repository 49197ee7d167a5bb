"""The hint that a finished shorter run with the same settings could be extended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from command_line import SMALL, Cli, composed
from sslcli.config.run_config import RunConfig
from sslcli.runs.shorter_run import shorter_run_hint

LINE = [*SMALL, "monitor.knn_k=10"]


def hint(*more: str) -> str | None:
    config = RunConfig.from_plain(composed("train", *LINE, "run_dir=runs/new", *more))
    return shorter_run_hint(config)


@pytest.fixture
def _here(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a finished run of 3 steps, and one in a sweep."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir, tmp_path / "runs/old", symlinks=True)
    shutil.copytree(run_dir, tmp_path / "runs/sweep_1/old", symlinks=True)


@pytest.mark.usefixtures("_here")
def test_a_finished_shorter_run_is_named(tmp_path: Path) -> None:
    expected = "is a finished run of 3 steps with the same settings"
    found = hint("train.max_steps=5")
    assert found is not None
    assert expected in found
    shutil.rmtree(tmp_path / "runs/sweep_1")
    assert hint("train.max_steps=5") == (
        f"runs/old {expected}: to continue it instead of starting at step 0, add run_dir=runs/old"
    )
    assert hint("train.max_steps=5", "launcher.threads=2") is not None
    for other in (["train.max_steps=3"], ["train.max_steps=2"], ["train.max_steps=5", "seed=1"]):
        assert hint(*other) is None
    (tmp_path / "runs/new").mkdir()
    (tmp_path / "runs/new/config.yaml").touch()
    assert hint("train.max_steps=5") is None


@pytest.mark.usefixtures("_here")
def test_unusable_runs_give_no_hint(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "runs/sweep_1")
    old = tmp_path / "runs/old"
    text = (old / "config.yaml").read_text()
    for damaged in (text.replace("seed: 0", "seed: 9"), "[", ""):
        (old / "config.yaml").write_text(damaged)
        assert hint("train.max_steps=5") is None
    (old / "config.yaml").write_text(text)
    (old / "overrides.txt").rename(old / "kept")
    assert hint("train.max_steps=5") is None
    (old / "kept").rename(old / "overrides.txt")
    (old / "done").unlink()
    assert hint("train.max_steps=5") is None
    (old / "done").touch()
    shutil.rmtree(old / "checkpoints")
    assert hint("train.max_steps=5") is None


@pytest.mark.usefixtures("_here")
def test_the_command_prints_the_hint_once(cli: Cli) -> None:
    ended = cli("ssl-train", *LINE, "train.max_steps=4")
    assert ended.code == 0
    assert ended.out.count("is a finished run of 3 steps with the same settings") == 1
    assert "same settings" not in cli("ssl-train", *LINE, "train.max_steps=4").out
