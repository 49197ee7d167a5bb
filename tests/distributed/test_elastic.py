"""Restarts of processes, with programs that only exit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sslcli.distributed import processes
from sslcli.distributed.elastic import crashed, first_failures, run_processes

pytestmark = pytest.mark.usefixtures("restored_signals")
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

# Each process ends long after it has reported, as on a slow machine.
REPORTS = """
import os, sys, time
from sslcli.distributed.processes import end_process
code = end_process("train", f"reason of start {os.environ['SSLCLI_RESTARTS']}", int(sys.argv[1]), wait=0)
time.sleep(3)
sys.exit(code)
"""


def test_the_reason_is_printed_once_even_if_the_processes_end_late(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_processes(["-c", REPORTS, "2"], processes=2, max_restarts=0, on_message=print) == 2
    assert capfd.readouterr().err == "ssl-train: reason of start 0\n"


def test_each_command_of_a_script_prints_its_own_reason(capfd: pytest.CaptureFixture[str]) -> None:
    """Here the agent starts a script, and the script starts the processes that report."""
    report = "from sslcli.distributed.processes import end_process; end_process('train', 'reason', 2, wait=0)"
    script = f"import subprocess, sys; [subprocess.run([sys.executable, '-c', {report!r}]) for _ in range(2)]"
    assert run_processes(["-c", script], processes=1, max_restarts=0, on_message=print) == 0
    assert capfd.readouterr().err == "ssl-train: reason\n" * 2


def test_each_start_prints_its_own_reason(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["-c", REPORTS, str(processes.EXIT_LOST)]
    assert run_processes(arguments, processes=2, max_restarts=1, on_message=lambda _: None) == 3
    assert capfd.readouterr().err == "ssl-train: reason of start 0\nssl-train: reason of start 1\n"


@pytest.mark.parametrize(
    ("codes", "wanted", "expected"),
    [
        ([0], 0, []),
        ([2], 2, []),
        ([3], 3, []),
        ([75], 75, []),
        ([-9, 0], 0, ["process 0 was ended by SIGKILL; all start again from the last checkpoint (restart 1 of 2)"]),
        ([-9, 75], 75, ["(restart 1 of 2)"]),
        ([1], 1, []),
        ([processes.EXIT_LOST, 0], 0, ["process 0 lost contact with the others; all start again"]),
        ([-9, -11, -9], 3, ["restart 1 of 2", "by SIGSEGV; all", "by SIGKILL after 2 restarts. The usual cause"]),
        (
            [-11] * 3,
            3,
            ["restart 1", "restart 2", "process 0 was ended by SIGSEGV after 2 restarts; run the same command"],
        ),
    ],
)
def test_what_may_not_happen_again_is_tried_again(
    tmp_path: Path, codes: list[int], wanted: int, expected: list[str]
) -> None:
    messages: list[str] = []
    began = time.monotonic()
    starts, before = tmp_path / "starts", dict(os.environ)
    arguments = ["-S", "-c", ENDS, str(starts), repr(codes)]
    assert run_processes(arguments, processes=2, max_restarts=2, on_message=messages.append) == wanted
    for part, message in zip(expected, messages, strict=True):
        assert part in message
    assert began <= float(starts.read_text().split()[2]) <= time.monotonic()
    lines = [line.split() for line in starts.read_text().splitlines()]
    assert sorted(line[:2] for line in lines) == sorted([str(r), str(n)] for r in range(2) for n in range(len(codes)))
    assert len({line[2] for line in lines}) == 1  # the time limit counts from the first start
    assert dict(os.environ) == before


def test_without_restarts_a_kill_ends_the_run_and_says_what_to_do(tmp_path: Path) -> None:
    messages: list[str] = []
    arguments = ["-S", "-c", ENDS, str(tmp_path / "starts"), "[-9]"]
    assert run_processes(arguments, processes=2, max_restarts=0, on_message=messages.append) == 3
    assert messages == [
        "process 0 was ended by SIGKILL. The usual cause of SIGKILL is too little memory; run the same command "
        "again to resume"
    ]


def test_processes_that_the_agent_ended_are_no_cause() -> None:
    assert first_failures({0: 1, 1: -15}) == {0: 1}
    assert first_failures({0: -9, 1: -15, 2: -15}) == {0: -9}
    assert first_failures({0: -15, 1: -15}) == {0: -15, 1: -15}


def test_one_process_that_tells_a_reason_decides_over_those_it_took_along() -> None:
    assert not crashed({0: 3, 1: -9})
    assert not crashed({})
    assert crashed({0: 1, 1: -6})
