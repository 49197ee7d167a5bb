"""File `metrics.jsonl` of a run: one JSON object per line, with the step and the scalars of this step.

After a run is resumed, the file contains no step twice, and no step is missing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sslcli.system.atomic import replace
from sslcli.system.stored import read_bytes, renamed, set_aside


class Metrics:
    """Writer of the file `metrics.jsonl` of a run.

    Args:
        path: the file. Lines of steps after `step` are removed, because the resumed run repeats these steps. An
            incomplete last line is removed as well.
        step: step from which the run resumes. A run that starts from the beginning (0) also repeats the line of step 0.
        warn: function that prints a warning. It is called if lines in the middle of the file are damaged. The damaged
            file is then kept under another name.
    """

    def __init__(self, path: Path, *, step: int, warn: Callable[[str], None]) -> None:
        lines, damaged = read_lines(path)
        kept = [line for line in lines if line["step"] <= step] if step else []
        self.dropped = lines[-1]["step"] if len(kept) < len(lines) else None  # last of the removed steps
        if damaged:
            copy = renamed(set_aside(path))
            warn(f"{path} is damaged{copy}: {damaged} lines are dropped, the other {len(lines)} lines are kept")
        replace(path, "".join(encode(line) for line in kept).encode())
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. `line` maps the names of scalars to values, and contains the key "step".

        The line is not lost if the process crashes. After `synchronize`, it is not lost if the machine crashes.
        """
        self.file.write(encode(line))
        self.file.flush()

    def synchronize(self) -> None:
        """Flush all lines to disk (fsync)."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def encode(line: dict[str, Any]) -> str:
    """Return a line of JSON text. NaN and infinite values become null, because JSON has no such values."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the intact lines of a metrics file by ascending step, or [] if the file does not exist."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the intact lines of a metrics file by ascending step, and the number of damaged lines.

    A line is damaged if it is not a JSON object of numbers with a step. If several lines have the same step, only the
    last of them is returned, and the others count as damaged. An incomplete last line is not counted, because a killed
    run leaves one. NUL bytes around a line are ignored, because a crash of the machine can leave them.

    Raises ConfigError if the file cannot be read.
    """
    try:
        content = read_bytes(path, remedy="restore a copy, or remove it")
    except FileNotFoundError:
        return [], 0
    *texts, last = content.split(b"\n")
    found: dict[int, dict[str, Any]] = {}
    damaged = 0
    for text in texts:
        line = _parse(text)
        damaged += line is None or line["step"] in found
        if line is not None:
            found[line["step"]] = line
    line = _parse(last)  # it is complete if only the newline is missing
    if line is not None:
        found[line["step"]] = line
    return [found[step] for step in sorted(found)], damaged


def _parse(text: bytes) -> dict[str, Any] | None:
    """Return the metrics in a line of a metrics file, or None if the line is damaged."""
    try:
        line = json.loads(text.strip(b"\0").decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        return None
    return line if all(value is None or type(value) in (int, float) for value in line.values()) else None


def newest(path: Path, name: str) -> float | None:
    """Return the value of the scalar `name` at the last step that has one, or None if no step has one.

    `path` is the metrics file of a run.
    """
    values = [line[name] for line in read(path) if line.get(name) is not None]
    return values[-1] if values else None
