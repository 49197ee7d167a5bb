"""Standard output and standard error without write errors, blocking writes and unsafe characters."""

from __future__ import annotations

import os
import re
import select
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from sslcli.errors import print_error, printable

PACKAGE = Path(__file__).parents[1]

PATIENCE = 10.0  # seconds to wait until a blocked stream accepts a write
# Layout characters, and the codes that move the cursor and set colors. Progress bars print these codes.
LAYOUT = re.compile(r"([\n\t\r\b]|\x1b\[[0-9;?]*[A-Za-z])")


class Terminal:
    """Text stream that drops text if it cannot be written.

    A training run must not stop because its output cannot be written. Two cases are handled:

    - A write to a pipe without a reader, to a full disk or to a closed terminal raises an error. After the first error,
      all text is dropped.
    - If the reader has stopped reading (a pager, or a terminal after Ctrl-S), a write blocks. Python handles no signals
      during such a write. Therefore, text is dropped while the reader does not read.

    `console.log` contains the whole output of a run.

    Characters that are unsafe to print are escaped, also in the output of other packages and in tracebacks. The control
    codes of progress bars are written unchanged. sslcli prints its own text with `print_text`, `print_error` and
    `Screen`, which escape these codes.

    Args:
        stream: stream to write to. Attributes that this class does not define are those of `stream`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_broken = False
        self.is_blocked = False
        self.poll: select.poll | None = None
        with suppress(OSError, ValueError, AttributeError):  # the stream has no descriptor, or the system has no poll
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            self.poll = poll

    def write(self, text: str) -> int:
        """Write `text`. If the write would block, or if a write has failed, drop `text`.

        Return the length of `text` in all cases.
        """
        if not self.is_broken and self.has_room():
            parts = LAYOUT.split(text)  # the parts at odd indices are the matches
            safe = "".join(part if i % 2 else printable(part) for i, part in enumerate(parts))
            try:
                self.stream.write(safe)
            except UnicodeEncodeError:
                encoding = self.stream.encoding or "ascii"
                self.write(safe.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError):
                self.give_up()
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if not self.is_broken and self.has_room():
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self.give_up()

    def has_room(self) -> bool:
        """Return True if the stream accepts a write without blocking.

        The first call on a blocked stream waits up to `PATIENCE` seconds. As long as the stream stays blocked, further
        calls return False immediately.
        """
        if self.poll is not None:
            with suppress(OSError):
                self.is_blocked = not self.poll.poll(0 if self.is_blocked else 1000 * PATIENCE)
        return not self.is_blocked

    def give_up(self) -> None:
        """Stop writing after an error, and redirect the stream to the null device.

        When the process exits, Python writes the text that is still buffered. Without the redirection, this write would
        raise the error again.
        """
        self.is_broken = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_terminal() -> None:
    """Wrap standard output and standard error of this process in one `Terminal` each.

    Also escape unsafe characters, such as control characters, in warnings of Python's `warnings`.
    """
    warnings.showwarning = show_warning
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Terminal):
            setattr(sys, name, Terminal(stream))


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of Python's `warnings` with unsafe characters escaped.

    This function replaces `warnings.showwarning` and has the same arguments. Warnings of sslcli are for users, so they
    are printed without the line of code.
    """
    if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
        text = f"warning: {printable(message)}\n"
    else:
        text = printable(warnings.formatwarning(message, category, filename, lineno, line), keep="\n")
    with suppress(OSError, AttributeError):  # AttributeError: standard error is closed
        (file or sys.stderr).write(text)


def print_text(text: str, *, to_stderr: bool = False) -> None:
    """Print lines of text to standard output, or to standard error. Unsafe characters are escaped."""
    print(printable(text, keep="\n"), file=sys.stderr if to_stderr else sys.stdout, flush=True)


def log_and_print(run_dir: Path, message: str) -> None:
    """Print a message about the processes of a run to standard error, and append it to the console.log of the run.

    If there is no console.log, the message is only printed.
    """
    print_error("train", message)
    with suppress(OSError), (run_dir / "console.log").open("r+", encoding="utf-8") as log:  # only if it exists
        log.seek(0, os.SEEK_END)
        log.write(printable(f"{message}\n", keep="\n"))
