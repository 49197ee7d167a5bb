"""Console output of a run: a progress bar in a terminal, or plain lines elsewhere.

The file console.log always gets plain lines.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import progress as rich_progress
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from sslcli.errors import printable

SUBJECTS = {"pixels": "raw pixels", "random": "random initialization", "trained": "trained"}  # key of results -> title
PLAIN_SECONDS = 5.0  # minimum time between two plain progress lines


class Screen:
    """Console output of a run.

    Args:
        log: file to which every printed line is appended, without styles and progress bars; None = no log.
        silent: if True, print and log nothing. Callers pass True on all ranks except rank 0.
    """

    def __init__(self, log: Path | None = None, *, silent: bool = False) -> None:
        self.console = Console(quiet=silent, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.log = None if log is None or silent else log.open("a", encoding="utf-8")
        self.bar: rich_progress.Progress | None = None
        self.last_line = 0.0

    def say(self, message: str, *, style: str = "") -> None:
        """Print and log a message. `style` is a text style of the library rich, such as `yellow`, for the console."""
        self.console.print(plain_text(message, style=style))
        self.write(message)

    def warn(self, message: str) -> None:
        """Print and log a warning."""
        self.say(f"warning: {message}", style="yellow")

    def table(self, title: str, rows: dict[str, Any]) -> None:
        """Print and log a table with a title. `rows` maps names to values, one row each."""
        # A rich.Table shortens or breaks values that are wider than the terminal, but a path must stay whole.
        self.console.print(plain_text(title, style="italic"))
        names = {name: printable(name) for name in rows}
        width = max(map(cell_len, names.values()), default=0)
        for name, value in rows.items():
            self.console.print(plain_text(f"  {set_cell_size(names[name], width)}  {show(value)}"))
            self.write(f"  {name}: {show(value)}")

    def write(self, line: str) -> None:
        """Append a line to the log. Unsafe characters are escaped.

        If a disk error occurs, print a warning and close the log. The run continues.
        """
        if self.log is None:
            return
        try:
            self.log.write(printable(line, keep="\n") + "\n")
            self.log.flush()
        except OSError as error:
            broken, self.log = self.log, None
            with suppress(OSError):
                broken.close()
            self.warn(f"{broken.name} cannot be written ({error.strerror}): the log ends here, the run continues")

    def start(self, title: str, *, total: int, done: int = 0) -> None:
        """Start the progress display.

        Args:
            title: text before the progress bar.
            total: number of units of work, such as steps.
            done: number of units that are already completed, such as the earlier steps of a resumed run.
        """
        self.title, self.total, self.start_time, self.done_at_start = printable(title), total, time.monotonic(), done
        self.last_line = time.monotonic()
        if self.console.is_terminal:
            self.bar = rich_progress.Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                TextColumn("{task.fields[facts]}", markup=False),
                console=self.console,
                transient=False,
            )
            self.task = self.bar.add_task(self.title, total=total, completed=done, facts="")
            self.bar.start()

    def advance(self, done: int, facts: str = "", *, always: bool = False) -> None:
        """Update the progress display.

        Args:
            done: number of units of work completed so far.
            facts: text after the progress bar, such as the loss.
            always: True appends a line of text to the log in any case. With False, a line is appended at most every
                `PLAIN_SECONDS` seconds. If the console is not a terminal, it shows these lines instead of a bar.
        """
        facts = printable(facts)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, facts=facts)
        now = time.monotonic()
        if now - self.last_line >= PLAIN_SECONDS or always:
            self.last_line = now
            rate = (done - self.done_at_start) / max(now - self.start_time, 1e-9)
            left = f", {duration((self.total - done) / rate)} left" if rate > 0 and done < self.total else ""
            line = f"{self.title} {done}/{self.total}{left}  {facts}".rstrip()
            self.write(line)
            if self.bar is None:
                self.console.print(plain_text(line))

    def stop(self) -> None:
        """End the progress display."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self.log is not None:
            self.log.close()


def plain_text(text: object, *, style: str = "") -> Text:
    """Return text for the console and for cells of tables. Control characters are escaped, see `printable`.

    rich interprets `[red]` and `:smile:` in strings as color and emoji. It does not interpret them in objects of the
    class `Text`, which this function returns.
    """
    return Text(printable(text, keep="\n"), style=style)


def duration(seconds: float) -> str:
    """Return a duration in seconds as text: `75` -> `1:15`, `4000` -> `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def show(value: Any) -> str:
    """Return a value as text. Floats get four significant digits, and large integers get thousands separators."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)


def percent(fraction: float) -> str:
    """Return a fraction as a percentage: `0.4567` -> `45.7 %`."""
    return f"{100 * fraction:.1f} %"


class Progress:
    """Progress bar for several pieces of work, such as several trainings.

    A call of the instance adds completed units of work. `total` is the number of units in all pieces together.
    """

    def __init__(self, screen: Screen, title: str, *, total: int) -> None:
        self.screen, self.done = screen, 0
        screen.start(title, total=total)

    def __call__(self, done: int, facts: str = "") -> None:
        """Add `done` completed units of work, and show the text `facts` after the bar."""
        self.done += done
        self.screen.advance(self.done, facts)
