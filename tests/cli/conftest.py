from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
import torch

from sslcli.cli import eval as ssl_eval
from sslcli.cli import train as ssl_train

MAINS = {"ssl-train": ssl_train.main, "ssl-eval": ssl_eval.main}
SMALL = [  # a run of a second
    "dataset=shapes",
    "dataset.limit=200",
    "dataset.test_images=100",
    "train.batch_size=32",
    "train.max_steps=3",
    "train.log_every=1",
    "launcher.threads=1",
]


class Ended(NamedTuple):
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


class Cli(Protocol):
    """Calls a command in this process: `cli("ssl-train", "seed=1")`."""

    def __call__(self, program: str, *arguments: str) -> Ended: ...


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """The commands as functions, in an empty folder; what they change in this process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(program: str, *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{program}", *arguments])
        with pytest.raises(SystemExit) as ended:
            MAINS[program]()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)

    yield call
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the run of `run_dir` was started in."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def run_dir(home: Path) -> Path:
    """A finished run of the installed command, in the directory it chose itself. Read it, and leave it as it is."""
    installed(home, "ssl-train", *SMALL, "monitor.knn_k=10")
    (found,) = (home / "runs").iterdir()
    return found


def installed(cwd: Path, program: str, *arguments: str, code: int = 0) -> str:
    """Run an installed command in `cwd`; what it printed. It must end with `code`."""
    ended = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert ended.returncode == code, ended.stdout[-3000:]
    assert "Traceback" not in ended.stdout
    return ended.stdout
