"""Calls of the commands in tests: in this process, or as the installed console script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch

from sslcli.cli import compose
from sslcli.cli.command import read_arguments

SMALL = [  # a run of a second
    "dataset=shapes",
    "dataset.limit=200",
    "dataset.test_images=100",
    "train.batch_size=32",
    "train.max_steps=3",
    "train.log_every_steps=1",
    "launcher.threads=1",
]


class Ended(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


class Cli(Protocol):
    """Calls a command in this process: `cli("ssl-train", "seed=1")`."""

    def __call__(self, program: str, *arguments: str) -> Ended: ...


def installed(cwd: Path, program: str, *arguments: str, code: int = 0) -> str:
    """Run an installed command in `cwd`; return its output. Fail unless it exits with `code`."""
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


def result(results_dir: Path, name: str) -> dict[str, Any]:
    """Return the content of the one result file in `home` whose name matches; `?` stands for a digit of a digest."""
    (path,) = results_dir.glob(f"{name}.json")
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


def composed(command: str, *overrides: str) -> dict[str, Any]:
    """Return the validated plain configuration of a command line of `ssl-train`, `ssl-eval` or `ssl-export`."""
    with patch.object(sys, "argv", [f"ssl-{command}", *overrides]), patch.object(sys, "path", list(sys.path)):
        (job,) = compose.checked_jobs(command, read_arguments(command))
    return job
