"""`metrics.jsonl`: one JSON object a line, continued without a doubled or missing step after an interruption."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from sslcli.system.atomic import replace


class Metrics:
    """The metrics of a run, a line at a time.

    Args:
        path: the file; lines of steps after `step`, which a killed run wrote beyond its last checkpoint, and a torn
            last line are dropped.
        step: the step the run goes on from.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        lines = read(path)
        kept = [line for line in lines if line["step"] <= step]
        self.dropped = lines[-1]["step"] if len(kept) < len(lines) else None  # the newest step of the lines left out
        replace(path, "".join(encode(line) for line in kept).encode())
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it survives the process from here on, and the machine from `synchronize` on."""
        self.file.write(encode(line))
        self.file.flush()

    def synchronize(self) -> None:
        """Make sure every line is on disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def encode(line: dict[str, Any]) -> str:
    """One line of JSON; values that are not finite become null, which JSON has a word for."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, [] where there is none; a torn last line is left out."""
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
    """The newest value of a scalar in a metrics file."""
    values = [line[name] for line in read(path) if line.get(name) is not None]
    return values[-1] if values else None
