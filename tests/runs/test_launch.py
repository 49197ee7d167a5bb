"""Start of a run: in this process, in several, or as a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import composed
from sslcli.config.run_config import RunConfig
from sslcli.distributed import processes
from sslcli.errors import BUG, ConfigError
from sslcli.runs import launch as _launch
from sslcli.runs import slurm_job, worker
from sslcli.system.launch_variables import AGENT, REQUIRED

SLURM = {"SLURM_JOB_ID": "1", "SLURM_NODEID": "0"}
pytestmark = pytest.mark.usefixtures("restored_signals")


def exit_code(folder: Path, monkeypatch: pytest.MonkeyPatch, launch: Callable[[dict[str, str]], int]) -> object:
    """Return the exit code of a process under an agent that runs `launch`."""
    config = RunConfig.from_plain(composed("train")).changed(run_dir=str(folder))
    (folder / "config.json").write_text(json.dumps(config.plain()))
    monkeypatch.setenv(AGENT, "1")
    monkeypatch.setattr("sslcli.distributed.processes.die_with_parent", lambda: None)
    monkeypatch.setattr(_launch, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["-m", str(folder / "config.json")])
    with pytest.raises(SystemExit) as ended:
        _launch.main()
    return ended.value.code


@pytest.mark.parametrize(("saved", "code"), [(False, 1), (True, processes.EXIT_LOST)])
def test_an_error_of_the_program_is_tried_again_only_from_a_newer_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: bool, code: int
) -> None:
    def fail(config: dict[str, str]) -> int:
        if saved:
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / "checkpoints" / "step-00000001.pt").touch()
        raise ZeroDivisionError

    monkeypatch.setitem(globals(), "__name__", "sslcli.runs.worker")  # code of this module counts as code of sslcli
    assert exit_code(tmp_path, monkeypatch, fail) == code
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

    assert exit_code(tmp_path, monkeypatch, fail) == 2
    assert "test_launch.fail failed while running ssl-train (ZeroDivisionError)" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Record the function that `launch` calls, and its configuration."""
    found: list[tuple[str, Any]] = []
    for name in (*REQUIRED, AGENT, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(worker, "run", lambda config: found.append(("worker", config)) or 0)
    monkeypatch.setattr(slurm_job, "launch", lambda config: found.append(("slurm", config)) or 0)

    def run_processes(arguments: list[str], *, processes: int, **_: Any) -> int:
        found.append((f"{processes} processes", json.loads(Path(arguments[-1]).read_text())))
        return 75

    monkeypatch.setattr("sslcli.distributed.elastic.run_processes", run_processes)
    return found


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    ("line", "environment", "expected"),
    [
        ([], {}, "worker"),
        ([], TORCHRUN, "worker"),
        ([], {"MASTER_ADDR": "here", "MASTER_PORT": "no port"}, "worker"),  # as long as no launcher sets RANK
        (["launcher=multi", "launcher.processes=3"], {}, "3 processes"),
        (["launcher=multi", "launcher.processes=3"], TORCHRUN, "worker"),
        (["launcher=multi"], TORCHRUN, "worker"),
        (["launcher=multi", "launcher.processes=2"], TORCHRUN | {"SSLCLI_AGENT": "1"}, "worker"),  # started by us
        (["launcher=multi", "dry_run=true"], {}, "worker"),
        (["launcher=slurm"], {}, "slurm"),
        (["launcher=slurm"], TORCHRUN | {"SSLCLI_AGENT": "1"}, "worker"),  # inside the job
    ],
)
def test_the_launcher_decides_where_a_run_happens(
    line: list[str], environment: dict[str, str], expected: str, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _launch.launch(composed("train", *line))
    assert [name for name, _ in started] == [expected]


@pytest.mark.parametrize(
    ("line", "environment", "expected"),
    [
        (["launcher=multi", "launcher.processes=2"], {"RANK": "0"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT are"),
        ([], {"RANK": "0"}, "unset RANK"),
        (["launcher=multi", "launcher.processes=2"], TORCHRUN, "launcher.processes is 2, but"),
        (["launcher=slurm"], TORCHRUN, "launcher is 'slurm', but"),
    ],
)
def test_variables_of_another_launcher_never_change_the_processes_silently(
    line: list[str],
    environment: dict[str, str],
    expected: str,
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        _launch.launch(composed("train", *line))
    assert started == []


def test_processes_get_the_configuration_with_an_absolute_run_directory(started: list[Any]) -> None:
    assert _launch.launch(composed("train", "launcher=multi", "run_dir=x", "seed=7")) == 75
    ((_, config),) = started
    assert config["run_dir"] == os.path.abspath("x")
    assert (config["seed"], config["_lines_"]) == (7, ["launcher=multi", "run_dir=x", "seed=7"])


@pytest.mark.parametrize(
    ("module", "arguments", "variables", "expected"),
    [
        (
            "launch",
            [],
            {"SSLCLI_AGENT": "1"},
            "usage: python -m sslcli.runs.launch CONFIG.json. ssl-train",
        ),
        ("launch", ["a", "b"], {"SSLCLI_AGENT": "1"}, "usage: python -m sslcli.runs.launch CONFIG.json"),
        ("launch", ["config.json"], {}, "the environment variable SSLCLI_AGENT is missing. usage"),
        ("launch", ["none.json"], {"SSLCLI_AGENT": str(os.getpid())}, "there is no none.json"),
        ("slurm_job", ["none.json"], SLURM, "usage: python -m sslcli.runs.slurm_job CONFIG.json HOST:PORT. ssl-train"),
        ("slurm_job", ["none.json", "a:1"], {"SLURM_JOB_ID": "1"}, "the environment variable SLURM_NODEID is missing"),
        ("slurm_job", ["none.json", "a:1"], SLURM, "there is no none.json"),
        ("slurm_job", ["config.json", "a"], SLURM, "the endpoint is 'a', but it must be HOST:PORT with a port"),
        ("slurm_job", ["config.json", "a:99999"], SLURM, "the endpoint is 'a:99999', but"),
    ],
)
def test_a_module_that_is_run_by_hand_prints_its_usage(
    module: str, arguments: list[str], variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RunConfig.from_plain(composed("train")).plain()))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SSLCLI"))}
    ended = subprocess.run(
        [sys.executable, "-m", f"sslcli.runs.{module}", *arguments],
        cwd=tmp_path,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"ssl-train: {expected}")
    assert ended.stderr.count("\n") == 1
