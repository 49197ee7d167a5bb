"""Printed lines without a reader: the run continues."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import TextIO

import pytest

from small_runs import SSL_TRAIN
from sslcli.report import terminal
from sslcli.report.terminal import Terminal, guard_terminal, log_and_print, print_text, show_warning

RUN = [
    "backbone.width=4",
    "dataset.limit=128",
    "train.batch_size=16",
    "train.log_every_steps=2",
    "monitor.pictures=0",
    "monitor.knn_every_epochs=0",
    "launcher.threads=1",
]


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """The reading end, and the writing end as a stream."""
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    yield reader, stream
    for close in (lambda: os.close(reader), stream.close):
        with suppress(OSError):
            close()


def test_what_is_read_is_written() -> None:
    stream = StringIO()
    terminal = Terminal(stream)
    print("a line", file=terminal)
    assert stream.getvalue() == "a line\n"
    assert not terminal.isatty()


def test_a_reader_that_is_gone_is_written_to_no_more(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    guarded = Terminal(stream)
    print("read", file=guarded, flush=True)
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    for _ in range(3):
        print("unread", file=guarded, flush=True)
    assert guarded.is_broken
    stream.flush()  # as Python does at exit: the remaining output is discarded


def test_a_full_disk_is_written_to_no_more() -> None:
    with open("/dev/full", "w") as stream:
        guarded = Terminal(stream)
        print("a line", file=guarded, flush=True)
        assert guarded.is_broken
        print("a line", file=guarded, flush=True)


def test_a_reader_that_does_not_read_is_waited_for_once(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.2)
    reader, stream = pipe
    guarded, start = Terminal(stream), time.monotonic()
    for _ in range(300):
        print("x" * 999, file=guarded, flush=True)
    assert time.monotonic() - start < 5
    assert guarded.is_blocked
    while os.read(reader, 1 << 20):
        if not terminal.select.select([reader], [], [], 0)[0]:
            break
    print("again", file=guarded, flush=True)
    assert os.read(reader, 1 << 20).endswith(b"again\n")


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        print("b\udce4d and \u00e4", file=Terminal(stream))
    assert (tmp_path / "out").read_text() == "b\\xe4d and \\xe4\n"


def test_other_packages_keep_progress_bars_and_send_the_terminal_no_commands() -> None:
    stream = StringIO()
    print("\r\x1b[2K50 %\x1b]0;title\x07\x1b[0m", file=Terminal(stream))
    assert stream.getvalue() == "\r\x1b[2K50 %\\x1b]0;title\\x07\x1b[0m\n"


def test_text_warnings_and_messages_have_no_escape_sequences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "console.log").touch()
    print_text("a \x1b[31m\nb")
    print_text("c \udcff", to_stderr=True)
    show_warning("d \x1b[31m", UserWarning, "file.py", 1, line="code")
    show_warning("w \x1b", UserWarning, terminal.__file__, 1, line="code")
    log_and_print(tmp_path, "e \x1b[31m \udcff")
    assert capsys.readouterr() == (
        "a \\x1b[31m\nb\n",
        "c \\xff\nfile.py:1: UserWarning: d \\x1b[31m\n  code\nwarning: w \\x1b\nssl-train: e \\x1b[31m \\xff\n",
    )
    assert (tmp_path / "console.log").read_text() == "e \\x1b[31m \\xff\n"


def test_only_the_functions_that_escape_text_print() -> None:
    """A call of `print` elsewhere would send names to the terminal as they are."""
    package = Path(terminal.__file__).parents[1]
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert found == {"errors.py", "report/terminal.py"}


def test_both_streams_are_guarded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, StringIO())
    guard_terminal()
    guarded = sys.stdout, sys.stderr
    guard_terminal()
    assert (sys.stdout, sys.stderr) == guarded
    assert all(isinstance(stream, Terminal) for stream in guarded)
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where the descriptor was closed
    guard_terminal()
    assert sys.stdout is None


def started(folder: Path, *arguments: str, stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [SSL_TRAIN, *RUN, *arguments, "run_dir=run"], cwd=folder, stdout=subprocess.PIPE, stderr=stderr
    )


def test_a_reader_that_ends_early_costs_a_run_nothing(tmp_path: Path) -> None:
    """As in `ssl-train ... 2>&1 | head -2`."""
    run = started(tmp_path, "train.max_steps=8", stderr=subprocess.STDOUT)
    assert run.stdout is not None
    assert len([run.stdout.readline() for _ in range(2)]) == 2
    run.stdout.close()
    assert run.wait(240) == 0
    assert (tmp_path / "run/done").exists()
    assert "done: " in (tmp_path / "run/console.log").read_text()


def test_ctrl_c_with_a_reader_that_it_ends_saves(tmp_path: Path) -> None:
    """As in `ssl-train ... 2>&1 | tee log`, where Ctrl-C ends tee first."""
    run = started(tmp_path, "train.max_steps=100000", stderr=subprocess.STDOUT)
    assert run.stdout is not None
    until = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    run.stdout.close()
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 75
    assert list((tmp_path / "run/checkpoints").glob("step-*.pt"))
