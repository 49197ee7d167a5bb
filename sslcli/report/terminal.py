"""Standard output and standard error that never end a run, whatever becomes of their reader."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

PATIENCE = 10.0  # seconds to wait for a reader that does not read


class Terminal:
    """A text stream that drops what its reader does not take.

    A write to a pipe without a reader, to a full disk or to a terminal that is gone raises an error, and a write to a
    reader that has stopped reading (a pager, a terminal after Ctrl-S) blocks, with every signal that comes meanwhile.
    Neither may cost a run its training: after an error nothing more is written, and while the reader does not read,
    lines are dropped. What a run prints is in its `console.log` as well.

    Args:
        stream: the stream to write to; everything but writing is left to it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_broken = False
        self.is_blocked = False
        self.poll: select.poll | None = None
        with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor, a system without poll
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            self.poll = poll

    def write(self, text: str) -> int:
        """Write `text` or drop it; its length."""
        if not self.is_broken and self.has_room():
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding or "ascii"
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError):
                self.give_up()
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        if not self.is_broken and self.has_room():
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self.give_up()

    def has_room(self) -> bool:
        """Wait until something can be written, once for `PATIENCE` seconds and then not at all until it can."""
        if self.poll is not None:
            with suppress(OSError):
                self.is_blocked = not self.poll.poll(0 if self.is_blocked else 1000 * PATIENCE)
        return not self.is_blocked

    def give_up(self) -> None:
        """Write no more, and let what is still buffered go nowhere when Python ends."""
        self.is_broken = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_terminal() -> None:
    """Let whatever this process prints go through a `Terminal`, on standard output and on standard error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Terminal):
            setattr(sys, name, Terminal(stream))


def log_and_print(run_dir: Path, message: str) -> None:
    """A message of the agent or of the end of all processes, to the terminal and to the log of the run."""
    print(f"ssl-train: {message}", file=sys.stderr, flush=True)
    with suppress(OSError), (run_dir / "console.log").open("r+", encoding="utf-8") as log:  # only where there is one
        log.seek(0, os.SEEK_END)
        log.write(f"{message}\n")
