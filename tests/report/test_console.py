from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sslcli.report import console
from sslcli.report.console import PLAIN_SECONDS, Screen, duration, percent, show


class Clock:
    """Stands in for `time` in the module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def on_a_terminal(screen: Screen) -> StringIO:
    """Make the screen treat its output as a terminal; return the output."""
    out = StringIO()
    screen.console = Console(file=out, force_terminal=True, width=200, highlight=False)
    return out


def test_without_a_terminal_messages_are_plain_lines_in_the_output_and_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a/very/long/path/" * 20 + "[red]not markup[/red] [1, 2]"
    with Screen(tmp_path / "log") as screen:
        screen.say(long, style="green")
        screen.warn("too warm")
    output = capsys.readouterr().out
    assert output == f"{long}\nwarning: too warm\n"
    assert (tmp_path / "log").read_text() == output


def test_a_table_has_a_row_for_each_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(tmp_path / "log") as screen:
        screen.table("What it comes to", {"steps": 12345, "learning rate": 0.0123456})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["What", "it", "comes", "to"], ["steps", "12,345"], ["learning", "rate", "0.01235"]]
    assert (tmp_path / "log").read_text() == "  steps: 12,345\n  learning rate: 0.01235\n"


UNSAFE = "[v2] [/b] :smile: \x1b[31m \udcff"
SHOWN = "[v2] [/b] :smile: \\x1b[31m \\xff"


@pytest.mark.parametrize("on_terminal", [False, True])
def test_names_are_shown_literally_everywhere(
    on_terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Screen(tmp_path / "log") as screen:
        out = on_a_terminal(screen) if on_terminal else None
        screen.say(UNSAFE)
        screen.table(UNSAFE, {UNSAFE: UNSAFE})
        screen.start(UNSAFE, total=2)
        clock.now += PLAIN_SECONDS
        screen.advance(1, UNSAFE)
    printed = capsys.readouterr().out if out is None else re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", out.getvalue())
    assert printed.count(SHOWN) >= 6
    assert "\x1b" not in printed
    log = (tmp_path / "log").read_text()
    assert log.count(SHOWN) == 5
    assert "\x1b" not in log


def test_without_a_terminal_progress_is_a_line_every_few_seconds_with_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Screen(tmp_path / "log") as screen:
        screen.start("step", total=100)
        clock.now += PLAIN_SECONDS - 1
        screen.advance(4, "loss 2")
        assert capsys.readouterr().out == ""
        clock.now += 1
        screen.advance(5, "loss 1")
        clock.now += 1
        screen.advance(6, "loss 1")
    output = capsys.readouterr().out
    assert output == "step 5/100, 1:35 left  loss 1\n"
    assert (tmp_path / "log").read_text() == output


def test_the_time_left_is_told_by_what_this_process_did(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    screen = Screen()
    screen.start("step", total=100, done=80)
    clock.now += 10
    screen.advance(90)
    assert capsys.readouterr().out == "step 90/100, 0:10 left\n"


def test_the_last_step_has_its_line_at_once_and_none_is_left(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    screen = Screen()
    screen.start("step", total=3)
    screen.advance(3, "loss 1", always=True)
    assert capsys.readouterr().out == "step 3/3  loss 1\n"


def test_on_a_terminal_progress_is_a_bar_and_the_lines_are_in_the_log_alone(tmp_path: Path, clock: Clock) -> None:
    with Screen(tmp_path / "log") as screen:
        out = on_a_terminal(screen)
        screen.start("step", total=100)
        clock.now += PLAIN_SECONDS
        screen.advance(5, "loss 1")
        screen.say("a message")
        screen.stop()
        assert screen.bar is None
    assert (tmp_path / "log").read_text() == "step 5/100, 1:35 left  loss 1\na message\n"
    output = out.getvalue()
    assert "a message" in output
    assert "5/100" in output
    assert "1:35 left" not in output


def test_a_silent_process_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(tmp_path / "log", silent=True) as screen:
        screen.warn("unheard")
        screen.table("title", {"a": 1})
        screen.start("step", total=1)
        screen.advance(1, always=True)
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "log").exists()


def test_a_log_is_continued(tmp_path: Path) -> None:
    for message in ("first run", "second run"):
        with Screen(tmp_path / "log", silent=False) as screen:
            screen.say(message)
    assert (tmp_path / "log").read_text() == "first run\nsecond run\n"


def test_a_full_disk_ends_the_log_and_not_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(Path("/dev/full")) as screen:
        screen.say("first")
        screen.say("second")
    warning = "warning: /dev/full cannot be written (No space left on device): the log ends here, the run continues"
    assert capsys.readouterr().out.splitlines() == ["first", warning, "second"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (75, "1:15"), (3599, "59:59"), (4000, "1:06:40")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (1e-9, "1e-09"), (9999, "9999"), (65536, "65,536"), (True, "True"), ("no", "no")],
)
def test_values(value: object, text: str) -> None:
    assert show(value) == text


def test_shares() -> None:
    assert percent(0.4567) == "45.7 %"


def test_a_table_keeps_a_long_path_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    path = "/a/very/long/path" * 12
    with Screen() as screen:
        screen.table("dry run", {"loss": 0.5, "views": path})
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "dry run",
        "  loss   0.5",
        f"  views  {path}",
    ]
