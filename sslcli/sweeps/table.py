"""What came of the jobs of a sweep: `sweep.csv`, and the table it ends with."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sslcli.engine import checkpoint_names
from sslcli.report.metrics import newest
from sslcli.sweeps.job import FINISHED, Record, Sweep, code_of, read, status_of
from sslcli.system import atomic
from sslcli.system.locks import locked


@dataclass(frozen=True)
class Row:
    """One job of the table."""

    name: str  # of its record
    overrides: dict[str, str]
    status: str
    code: int | None
    steps: int | None  # that are saved
    value: float | None  # of the metric that ranks
    run_dir: str  # "" for a job of ssl-eval

    def told(self, metric: str | None) -> str:
        """The metric of the job in words."""
        return "" if metric is None or self.value is None else f" ({metric} {shown(metric, self.value)})"


def update(sweep: Sweep) -> list[Row]:
    """Look at every job that was ever part of this sweep, and write the table anew; its rows, best first."""
    with locked(sweep.records / "table.lock"):  # a table that was read earlier must not be written later
        rows = ranked(rows_of(sweep), lowest=sweep.settings.lowest)
        atomic.replace(sweep.folder / "sweep.csv", as_csv(rows, sweep.metric).encode())
    return rows


def rows_of(sweep: Sweep) -> list[Row]:
    """A row for each record."""
    return [_row(sweep, path.stem, read(path)) for path in sorted(sweep.records.glob("*.json"))]


def _row(sweep: Sweep, name: str, record: Record) -> Row:
    steps = value = None
    if record.run_dir is not None:
        run_dir = sweep.folder / record.run_dir
        saved = checkpoint_names.all_of(run_dir)
        steps = checkpoint_names.step_of(saved[-1]) if saved else None
        value = None if sweep.metric is None else value_of(run_dir, sweep.metric)
    pairs = (line.partition("=")[::2] for line in record.overrides if not line.startswith("run_dir="))
    return Row(
        name=name,
        overrides={key.lstrip("+"): value for key, value in pairs},
        status=status_of(sweep, name, record),
        code=code_of(sweep.folder, record),
        steps=steps,
        value=value,
        run_dir=record.run_dir or "",
    )


def value_of(run_dir: Path, metric: str) -> float | None:
    """The newest value of a scalar of a run."""
    path = run_dir / "metrics.jsonl"
    return _newest(path, metric, path.stat().st_mtime_ns) if path.exists() else None


@cache
def _newest(path: Path, metric: str, _: int) -> float | None:
    """Reads a file once for each time it changed: the table is written as often as jobs end."""
    return newest(path, metric)


def ranked(rows: Iterable[Row], *, lowest: bool) -> list[Row]:
    """Finished jobs first, then the best value of the metric, then those that have none."""

    def place(row: Row) -> tuple[bool, bool, float]:
        value = 0.0 if row.value is None else row.value if lowest else -row.value
        return row.status != FINISHED, row.value is None, value

    return sorted(rows, key=place)


def as_csv(rows: list[Row], metric: str | None) -> str:
    """The table as a file: a column for each override."""
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    lines: list[list[object]] = [
        [*keys, "status", "exit_code", *([] if metric is None else ["steps", metric, "run_dir"])]
    ]
    for row in rows:
        of_run = [] if metric is None else [row.steps, row.value, row.run_dir]
        lines.append([*(row.overrides.get(key) for key in keys), row.status, row.code, *of_run])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def as_text(rows: list[Row], metric: str | None) -> str:
    """The table for people: overrides that are the same for all jobs are left out."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    telling = [key for key in keys if len({row.overrides.get(key) for row in rows}) > 1]
    lines = [["", *telling, "status", "exit", *([] if metric is None else ["steps", metric, "run_dir"])]]
    for place, row in enumerate(rows, start=1):
        rank = f"{place}." if row.value is not None else ""
        of_run = [] if metric is None else [row.steps, shown(metric, row.value), row.run_dir]
        cells = [rank, *(row.overrides.get(key) for key in telling), row.status, row.code, *of_run]
        lines.append(["-" if cell is None else str(cell) for cell in cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def shown(metric: str, value: float | None) -> str:
    """A value of a metric as people read it."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if metric.startswith("monitor/knn") else f"{value:.5g}"
