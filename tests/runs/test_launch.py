"""Start of a run: in this process, in several, or as a job."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import composed
from sslcli.distributed import processes
from sslcli.errors import BUG
from sslcli.runs import launch as _launch
from sslcli.runs import slurm_job, worker

pytestmark = pytest.mark.usefixtures("restored_signals")


@pytest.mark.parametrize(("saved", "code"), [(False, 1), (True, processes.EXIT_LOST)])
def test_an_error_of_the_program_is_tried_again_only_from_a_newer_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: bool, code: int
) -> None:
    def fail(config: dict[str, str]) -> int:
        if saved:
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / "checkpoints" / "step-00000001.pt").touch()
        raise ZeroDivisionError

    (tmp_path / "config.json").write_text(json.dumps({"run_dir": str(tmp_path), "trust": []}))
    monkeypatch.setitem(globals(), "__name__", "sslcli.runs.worker")  # code of this module counts as code of sslcli
    monkeypatch.setattr("sslcli.distributed.processes.die_with_parent", lambda: None)
    monkeypatch.setattr(_launch, "launch", fail)
    monkeypatch.setattr(sys, "argv", ["-m", str(tmp_path / "config.json")])
    with pytest.raises(SystemExit) as ended:
        _launch.main()
    assert ended.value.code == code
    shown = capsys.readouterr().err
    assert shown.count("Traceback") == 1
    assert BUG in shown


def test_an_exception_of_user_code_is_never_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: dict[str, str]) -> int:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "step-00000001.pt").touch()
        raise ZeroDivisionError

    (tmp_path / "config.json").write_text(json.dumps({"run_dir": str(tmp_path), "trust": []}))
    monkeypatch.setattr("sslcli.distributed.processes.die_with_parent", lambda: None)
    monkeypatch.setattr(_launch, "launch", fail)
    monkeypatch.setattr(sys, "argv", ["-m", str(tmp_path / "config.json")])
    with pytest.raises(SystemExit) as ended:
        _launch.main()
    assert ended.value.code == 2
    assert "test_launch.fail failed while running ssl-train (ZeroDivisionError)" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Record the function that `launch` calls, and its configuration."""
    found: list[tuple[str, Any]] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(worker, "run", lambda config: found.append(("worker", config)) or 0)
    monkeypatch.setattr(slurm_job, "launch", lambda config: found.append(("slurm", config)) or 0)

    def run_processes(arguments: list[str], *, processes: int, **_: Any) -> int:
        found.append((f"{processes} processes", json.loads(Path(arguments[-1]).read_text())))
        return 75

    monkeypatch.setattr("sslcli.distributed.elastic.run_processes", run_processes)
    return found


@pytest.mark.parametrize(
    ("line", "rank", "expected"),
    [
        ([], None, "worker"),
        (["launcher=multi", "launcher.processes=3"], None, "3 processes"),
        (["launcher=multi", "launcher.processes=3"], "1", "worker"),  # started by torchrun
        (["launcher=multi", "dry_run=true"], None, "worker"),
        (["launcher=slurm"], None, "slurm"),
        (["launcher=slurm"], "0", "worker"),  # inside the job
    ],
)
def test_the_launcher_decides_where_a_run_happens(
    line: list[str], rank: str | None, expected: str, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    _launch.launch(composed("train", *line))
    assert [name for name, _ in started] == [expected]


def test_processes_get_the_configuration_with_an_absolute_run_directory(started: list[Any]) -> None:
    assert _launch.launch(composed("train", "launcher=multi", "run_dir=x", "seed=7")) == 75
    ((_, config),) = started
    assert config["run_dir"] == os.path.abspath("x")
    assert (config["seed"], config["_lines_"]) == (7, ["launcher=multi", "run_dir=x", "seed=7"])
