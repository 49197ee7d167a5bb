"""Imports of child processes: no module of the current directory is imported by accident."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from command_line import SMALL, installed
from sslcli.errors import ConfigError
from sslcli.system import child_processes

NAMES = ["yaml", "torch", "simplejpeg", "json", "runpy", "numpy", "sslcli"]
FOREIGN = 'open("ran", "a").write(__name__ + "\\n")\n'
TRUSTED = """
from sslcli.methods.byol import BYOL

open("imported", "a").write("mine\\n")


class Mine(BYOL):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of modules that must not be imported."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(FOREIGN)
    return tmp_path


def run(folder: Path, *arguments: str, **variables: str) -> str:
    line = [sys.executable, *arguments]
    ended = subprocess.run(line, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_without_the_options_such_a_module_runs(folder: Path) -> None:
    run(folder, "-c", "import yaml")
    assert (folder / "ran").exists()


@pytest.mark.parametrize("ours", [True, False])
def test_a_module_runs_without_those_of_the_current_directory(ours: bool, folder: Path) -> None:
    output = run(folder, *child_processes.arguments("sslcli.cli.train", ours=ours), "--help")
    assert output.startswith("ssl-train")
    assert not (folder / "ran").exists()


def test_an_older_python_keeps_them_out_as_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    arguments = child_processes.arguments("sslcli.cli.train")
    assert "-P" not in arguments
    run(folder, *arguments, "--help")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("ours", [True, False])
def test_pythonpath_keeps_its_meaning(ours: bool, folder: Path) -> None:
    (folder / "there").mkdir()
    (folder / "there" / "module.py").write_text("import sys\nprint(sys.argv[1:], __name__)\n")
    output = run(folder, *child_processes.arguments("module", ours=ours), "one", "two", PYTHONPATH="there")
    assert output == "['one', 'two'] __main__\n"


@pytest.mark.parametrize(
    "more",
    [
        ["launcher=multi", "launcher.processes=2"],
        ["--multirun", "seed=1", "hydra.sweep.dir=here"],
        ["--multirun", "seed=1", "hydra.sweep.dir=here", "hydra/launcher=joblib"],
    ],
)
def test_a_run_leaves_the_modules_of_the_current_directory_alone(more: list[str], folder: Path) -> None:
    installed(
        folder, "ssl-train", *SMALL, "train.max_steps=1", "dataset.workers=2", "monitor.knn_every_epochs=0", *more
    )
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("more", [["launcher=multi", "launcher.processes=2"], ["--multirun", "seed=1"]])
def test_a_trusted_module_may_lie_there(more: list[str], folder: Path) -> None:
    (folder / "mine.py").write_text(TRUSTED)
    line = [*SMALL, "train.max_steps=1", "method=byol", "method._target_=mine.Mine", "trust=[mine]"]
    installed(folder, "ssl-train", *line, "monitor.knn_every_epochs=0", *more)
    assert (folder / "imported").exists()
    assert not (folder / "ran").exists()


def test_the_arguments_of_a_child_process_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    given = partial(child_processes.given_arguments, "sslcli.x", "A", "B", launcher="multi", variables=["SET"])
    monkeypatch.setenv("SET", "1")
    monkeypatch.setattr(sys, "argv", ["x.py", "1", "2"])
    assert given() == ["1", "2"]
    for wrong in (["x.py"], ["x.py", "1"], ["x.py", "1", "2", "3"]):
        monkeypatch.setattr(sys, "argv", wrong)
        with pytest.raises(ConfigError, match=r"^usage: python -m sslcli.x A B. ssl-train launcher=multi runs"):
            given()
    monkeypatch.setattr(sys, "argv", ["x.py", "1", "2"])
    monkeypatch.delenv("SET")
    with pytest.raises(ConfigError, match=r"^the environment variable SET is missing. usage: python -m sslcli.x A B"):
        given()
