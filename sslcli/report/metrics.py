"""File `metrics.jsonl`: one JSON object per line. Resuming a run causes no duplicate or missing steps."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from sslcli.system.atomic import replace


class Metrics:
    """Writer of the metrics of a run.

    Args:
        path: metrics file. Lines of steps after `step` are dropped, since a killed run wrote these lines after its last
            checkpoint. An incomplete last line is dropped as well.
        step: step from which the run resumes.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        lines = read(path)
        kept = [line for line in lines if line["step"] <= step]
        self.dropped = lines[-1]["step"] if len(kept) < len(lines) else None  # newest dropped step
        replace(path, "".join(encode(line) for line in kept).encode())
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line.

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
    """Return a line of JSON. NaN and infinite values become null, because JSON has no such values."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, or [] if the file does not exist. An incomplete last line is omitted."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def newest(path: Path, name: str) -> float | None:
    """Return the newest value of a scalar in a metrics file, or None if the file has no value."""
    values = [line[name] for line in read(path) if line.get(name) is not None]
    return values[-1] if values else None
