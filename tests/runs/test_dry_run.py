"""Dry run: measures a few steps, trains nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from command_line import SMALL, Cli
from sslcli.runs import dry_run
from sslcli.runs.dry_run import STEPS


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_dry_run_measures_and_trains_nothing(cli: Cli, tmp_path: Path) -> None:
    ended = cli("ssl-train", *SMALL, "run_dir=dry", "dry_run=true")
    assert (ended.code, ended.err) == (0, "")
    for part in (
        "learning rate",
        "backbone parameters",
        "peak memory",
        "estimated time",
        "view 0",
        "the dry run is complete",
    ):
        assert part in ended.out
    assert files(tmp_path / "dry") == ["views.png"]


def test_a_dry_run_of_a_longer_run_estimates_only_the_added_steps(trained: Path, cli: Cli) -> None:
    line = ["ssl-train", *SMALL, "monitor.knn_k=10", f"run_dir={trained}", "dry_run=true"]
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    ended = cli(*line, "train.max_steps=10")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"steps to train +7, after 3 steps", ended.out)
    assert re.search(r"steps to train +0\n", cli(*line).out)
    del before[next(path for path in before if path.name == "views.png")]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_directory_that_cannot_be_written_is_refused(cli: Cli) -> None:
    ended = cli("ssl-train", *SMALL, "run_dir=/proc/dry", "dry_run=true")
    assert (ended.code, "run_dir is /proc/dry" in ended.err) == (2, True)


def test_a_few_steps_are_optimized(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step also pays for the setup of kernels and memory, so the time of the last is shown."""
    calls = []
    optimize = dry_run.optimize

    def counted(*arguments: object) -> object:
        calls.append(len(calls))
        return optimize(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dry_run, "optimize", counted)
    assert cli("ssl-train", *SMALL, "run_dir=dry", "dry_run=true").code == 0
    assert calls == list(range(STEPS))
    calls.clear()
    assert cli("ssl-train", *SMALL, "train.max_steps=1", "run_dir=dry", "dry_run=true").code == 0
    assert len(calls) == 1
