"""Course of a command: arguments, and what it does with them."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from sslcli.cli.command import command, flags_of, read_arguments
from sslcli.errors import BUG, ConfigError


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def arguments_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    def read(*arguments: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["ssl-train", *arguments])
        return read_arguments("train")

    return read


def test_flags_and_overrides_come_in_any_order(arguments_of: Any) -> None:
    arguments = arguments_of("seed=1", "--multirun", "train.epochs=2", "--config-dir", "mine", "name=x")
    assert arguments.overrides == ["seed=1", "train.epochs=2", "name=x"]
    assert arguments.multirun
    assert arguments.config_dir == os.path.abspath("mine")


def test_a_tilde_is_the_home_directory_and_no_deletion(
    arguments_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = arguments_of("run_dir=~/a", "--config-dir=~/conf")
    assert arguments.overrides == ['run_dir="~/a"']  # in quotes, because ~ deletes a key in Hydra's grammar
    assert arguments.config_dir == str(tmp_path / "conf")


def test_old_names_are_replaced_with_a_note(arguments_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments_of("monitor.knn_every=77").overrides == ["monitor.knn_every_epochs=77"]
    assert "monitor.knn_every=77 is now monitor.knn_every_epochs=77" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--epochs", "5"], "there is no flag --epochs"),
        (["--experimental-rerun", "job.pickle"], "unpickle"),
        (["--multirun", "--cfg", "job"], "--multirun"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(line: list[str], expected: str, arguments_of: Any) -> None:
    with pytest.raises(ConfigError, match=expected):
        arguments_of(*line)


def test_flags_are_written_as_a_command_line_has_them() -> None:
    arguments = Namespace(overrides=["a=1"], multirun=True, config_dir="/a b", cfg=None, info=False)
    assert flags_of(arguments) == ["--multirun", "--config-dir=/a b"]
    assert flags_of(arguments, only=("config_dir",)) == ["--config-dir=/a b"]


def ended(monkeypatch: pytest.MonkeyPatch, run: Any, *arguments: str, name: str = "train") -> int:
    monkeypatch.setattr(sys, "argv", [f"ssl-{name}", *arguments])
    return command(name, run)


def test_the_exit_code_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[dict[str, Any]] = []
    assert ended(monkeypatch, lambda job: jobs.append(job) or 75, "seed=5") == 75
    assert [job["seed"] for job in jobs] == [5]


def test_a_configuration_error_and_ctrl_c_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(job: dict[str, Any]) -> int:
        raise ConfigError("the reason")

    def interrupt(job: dict[str, Any]) -> int:
        raise KeyboardInterrupt

    assert ended(monkeypatch, refuse) == 2
    assert capsys.readouterr().err.startswith("ssl-train: the reason")
    assert ended(monkeypatch, interrupt) == 130
    assert capsys.readouterr().err == "ssl-train: interrupted\n"


def test_an_unexpected_exception_ends_with_the_traceback_of_the_user_or_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(job: dict[str, Any]) -> int:
        raise KeyError("x")

    assert ended(monkeypatch, fail) == 2
    shown = capsys.readouterr().err
    assert "test_command.fail failed while running ssl-train (KeyError: 'x')\nTraceback" in shown
    assert BUG not in shown
    monkeypatch.setitem(globals(), "__name__", "sslcli.runs.worker")  # code of this module counts as code of sslcli
    assert ended(monkeypatch, fail) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith(f"KeyError: 'x'\nssl-train: {BUG}\n")


def test_cfg_prints_the_configuration_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[dict[str, Any]] = []
    assert ended(monkeypatch, lambda job: jobs.append(job) or 1, "--cfg", "job", "seed=5") == 0
    assert "seed: 5\n" in capsys.readouterr().out
    assert jobs == []


def test_an_export_has_no_multirun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(monkeypatch, lambda job: 0, "--multirun", "run=a,b", name="export") == 2
    assert "--multirun" in capsys.readouterr().err
