"""Results of a sweep (`--multirun`): the file `sweep.csv`, and the table that is printed at the end."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sslcli.engine import checkpoint_names
from sslcli.errors import printable
from sslcli.report.console import plain_text
from sslcli.report.metrics import newest
from sslcli.sweeps.job import Record, Sweep, read_record
from sslcli.sweeps.status import FINISHED, code_of, status_of
from sslcli.system import atomic
from sslcli.system.locks import locked

MAX_WIDTH = 10_000  # characters per line; so large that only the terminal wraps lines


@dataclass(frozen=True)
class Row:
    """One job, as a row in the table of the results of a sweep."""

    name: str  # name of the job's record
    overrides: dict[str, str]
    status: str
    code: int | None  # exit code
    steps: int | None  # step of the newest checkpoint
    value: float | None  # value of the metric that ranks the jobs
    run_dir: str  # "" for a job of ssl-eval

    def metric_text(self, metric: str | None) -> str:
        """Return the name and the value of the metric in parentheses, or "" if the job has no value."""
        return "" if metric is None or self.value is None else f" ({metric} {shown(metric, self.value)})"


def update(sweep: Sweep) -> list[Row]:
    """Rewrite the file `sweep.csv` from the records of all jobs in the sweep's folder.

    Return the rows of the table, best job first.
    """
    with locked(sweep.records / "table.lock"):  # without this lock, a slower process could overwrite a newer table
        rows = ranked(rows_of(sweep), lowest=sweep.settings.is_minimized)
        atomic.replace(sweep.folder / "sweep.csv", as_csv(rows, sweep.metric).encode("utf-8", "surrogateescape"))
    return rows


def rows_of(sweep: Sweep) -> list[Row]:
    """Return one row for each job that has a record in the sweep's folder."""
    return [_row(sweep, path.stem, read_record(sweep, path.stem)) for path in sorted(sweep.records.glob("*.json"))]


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
    """Return the last value of the scalar `metric` in the metrics.jsonl of a run, or None if there is no value."""
    path = run_dir / "metrics.jsonl"
    return _newest(path, metric, path.stat().st_mtime_ns) if path.exists() else None


@cache
def _newest(path: Path, metric: str, _: int) -> float | None:
    """Return the last value of the scalar `metric` in the metrics file `path`.

    Results are cached. The third argument is the modification time of the file, so that a changed file is read again.
    """
    return newest(path, metric)


def ranked(rows: Iterable[Row], *, lowest: bool) -> list[Row]:
    """Return the rows of the jobs, best job first.

    Finished jobs come before all other jobs. Within each of these two parts, jobs are sorted by value: the best value
    comes first, and jobs without a value come last. `lowest` is True if the lowest value is best.
    """

    def place(row: Row) -> tuple[bool, bool, float]:
        value = 0.0 if row.value is None else row.value if lowest else -row.value
        return row.status != FINISHED, row.value is None, value

    return sorted(rows, key=place)


def as_csv(rows: list[Row], metric: str | None) -> str:
    """Return the table as CSV text, with one column for each key that an override sets.

    `metric` is the name of the scalar that ranks the jobs; None for ssl-eval.
    """
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
    """Return the table as aligned text. Overrides that are equal in all jobs are omitted.

    `metric` is the name of the scalar that ranks the jobs; None for ssl-eval.
    """
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    varied = [key for key in keys if len({row.overrides.get(key) for row in rows}) > 1]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", *varied, "status", "exit", *([] if metric is None else ["steps", metric, "run_dir"])):
        table.add_column(plain_text(printable(title)), no_wrap=True)
    for place, row in enumerate(rows, start=1):
        rank = f"{place}." if row.value is not None else ""
        of_run = [] if metric is None else [row.steps, shown(metric, row.value), row.run_dir]
        cells = [rank, *(row.overrides.get(key) for key in varied), row.status, row.code, *of_run]
        table.add_row(*(plain_text("-" if cell is None else printable(cell)) for cell in cells))
    console = Console(file=io.StringIO(), width=MAX_WIDTH, color_system=None)
    with console.capture() as text:
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def shown(metric: str, value: float | None) -> str:
    """Return the value of the scalar `metric` as text, or "-" for None. k-NN accuracies are shown in percent."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if metric.startswith("monitor/knn") else f"{value:.5g}"
