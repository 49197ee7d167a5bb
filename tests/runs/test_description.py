"""Files that describe a run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sslcli.runs.description import git_state, write_description

FACTS: dict[str, Any] = {"effective": {"steps": 3}}


def execution(device: str, threads: int) -> dict[str, Any]:
    return {"device": device, "threads": threads}


def described(run_dir: Path) -> Path:
    """Create the directory of a run, without checkpoint."""
    run_dir.mkdir()
    lines = ["method=byol", "seed=0"]
    write_description(run_dir, {"seed": 0}, overrides=lines, **FACTS, execution=execution("cpu", 1), warn=pytest.fail)
    return run_dir


def test_a_continued_run_keeps_its_first_command_line_and_environment_and_adds_the_latest(tmp_path: Path) -> None:
    run_dir = described(tmp_path / "run")
    describe_again(run_dir, pytest.fail)
    assert (run_dir / "overrides.txt").read_text() == "method=byol\nseed=0\n"
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (environment["first"]["device"], environment["first"]["threads"]) == ("cpu", 1)
    assert (environment["latest"]["device"], environment["latest"]["threads"]) == ("cuda:0", 4)


def describe_again(run_dir: Path, warn: Callable[[str], None]) -> None:
    write_description(run_dir, {"seed": 0}, overrides=["x=1"], **FACTS, execution=execution("cuda:0", 4), warn=warn)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"latest": {}}', b'{"first": 1, "latest": {}}', b"\0" * 9]
)
def test_a_damaged_environment_is_set_aside_and_the_current_one_is_the_first(content: bytes, tmp_path: Path) -> None:
    run_dir, warnings = described(tmp_path / "run"), list[str]()
    (run_dir / "environment.json").write_bytes(content)
    describe_again(run_dir, warnings.append)
    assert len(warnings) == 1
    assert "environment.json is damaged (" in warnings[0]
    assert "is now named environment.json.damaged:" in warnings[0]
    assert (run_dir / "environment.json.damaged").read_bytes() == content
    assert json.loads((run_dir / "environment.json").read_text())["first"]["device"] == "cuda:0"


def test_the_state_of_the_code_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    (tmp_path / "new").write_text("")
    state = git_state()
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["changed_files"] == 1
