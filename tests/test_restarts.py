"""Which ends of a process make all start again, with programs that only end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sslcli.distributed import processes
from sslcli.distributed.elastic import causes, crashed, run_processes
from sslcli.distributed.processes import begun, restarted
from sslcli.runs import launch as _launch

ENDS = """
import os, signal, sys, time
with open(sys.argv[1], "a") as file:
    file.write(os.environ["RANK"] + " " + os.environ["SSLCLI_RESTARTS"] + " " + os.environ["SSLCLI_BEGUN"] + "\\n")
if os.environ["RANK"] == "0":
    while not os.path.exists(sys.argv[1]) or open(sys.argv[1]).read().count("\\n") % 2:
        time.sleep(0.01)
    code = eval(sys.argv[2])[int(os.environ["SSLCLI_RESTARTS"])]
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
"""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """The agent takes signals over, and its process usually ends with it."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("codes", "wanted", "told"),
    [
        ([0], 0, []),
        ([2], 2, []),
        ([3], 3, []),
        ([75], 75, []),
        ([-9, 0], 0, ["process 0 was ended by SIGKILL; all start again from the last checkpoint (restart 1 of 2)"]),
        ([-9, 75], 75, ["(restart 1 of 2)"]),
        ([1], 1, []),
        ([processes.EXIT_LOST, 0], 0, ["process 0 could not go on; all start again"]),
        ([-9, -11, -9], 3, ["restart 1 of 2", "by SIGSEGV; all", "by SIGKILL after 2 restarts. The usual cause"]),
    ],
)
def test_what_may_not_happen_again_is_tried_again(
    tmp_path: Path, codes: list[int], wanted: int, told: list[str]
) -> None:
    messages: list[str] = []
    began = time.monotonic()
    starts, before = tmp_path / "starts", dict(os.environ)
    arguments = ["-S", "-c", ENDS, str(starts), repr(codes)]
    assert run_processes(arguments, processes=2, max_restarts=2, tell=messages.append) == wanted
    for part, message in zip(told, messages, strict=True):
        assert part in message
    assert began <= float(starts.read_text().split()[2]) <= time.monotonic()
    lines = [line.split() for line in starts.read_text().splitlines()]
    assert sorted(line[:2] for line in lines) == sorted([str(r), str(n)] for r in range(2) for n in range(len(codes)))
    assert len({line[2] for line in lines}) == 1  # the time limit counts from the first start
    assert dict(os.environ) == before


def test_without_restarts_a_kill_ends_the_run_and_says_what_to_do(tmp_path: Path) -> None:
    messages: list[str] = []
    arguments = ["-S", "-c", ENDS, str(tmp_path / "starts"), "[-9]"]
    assert run_processes(arguments, processes=2, max_restarts=0, tell=messages.append) == 3
    assert messages == [
        "process 0 was ended by SIGKILL. The usual cause of SIGKILL is too little memory; start the same command "
        "again to go on"
    ]


def test_processes_that_the_agent_ended_are_no_cause() -> None:
    assert causes({0: 1, 1: -15}) == {0: 1}
    assert causes({0: -9, 1: -15, 2: -15}) == {0: -9}
    assert causes({0: -15, 1: -15}) == {0: -15, 1: -15}


def test_one_process_that_tells_a_reason_decides_over_those_it_took_along() -> None:
    assert not crashed({0: 3, 1: -9})
    assert not crashed({})
    assert crashed({0: 1, 1: -6})


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
    monkeypatch.setattr("sslcli.distributed.processes.die_with_parent", lambda: None)
    monkeypatch.setattr(_launch, "launch", fail)
    monkeypatch.setattr(sys, "argv", ["-m", str(tmp_path / "config.json")])
    with pytest.raises(SystemExit) as ended:
        _launch.main()
    assert ended.value.code == code
    assert capsys.readouterr().err.count("Traceback") == 1


def test_a_process_knows_whether_it_was_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restarted()
    monkeypatch.setenv("SSLCLI_RESTARTS", "2")
    assert restarted()
    monkeypatch.setenv("SSLCLI_BEGUN", "12.5")
    assert begun() == 12.5
