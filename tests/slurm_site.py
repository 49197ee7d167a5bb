"""Stand-ins for the commands of Slurm, as short shell scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sslcli.cli import eval as ssl_eval
from sslcli.cli import train as ssl_train


class Site:
    """A folder to work in, with stand-ins for the commands of Slurm first on the path."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.path, self.monkeypatch, self.capture = path, monkeypatch, capture

    def write(self, name: str, text: str) -> None:
        """Write a shell script that replaces a command."""
        path = self.path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def train(self, *arguments: str) -> tuple[int, str, str]:
        """Call `ssl-train ARGUMENTS` in this process; return exit code, stdout and stderr."""
        return self.call(ssl_train.main, "ssl-train", *arguments)

    def evaluate(self, *arguments: str) -> tuple[int, str, str]:
        """As `train`, for `ssl-eval`."""
        return self.call(ssl_eval.main, "ssl-eval", *arguments)

    def call(self, main: Callable[[], None], *line: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", list(line))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self.capture.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    @property
    def submissions(self) -> int:
        path = self.path / "submitted"
        return len(path.read_text().splitlines()) if path.exists() else 0
