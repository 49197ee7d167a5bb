"""Tables that ssl-eval prints at the end: all protocols of one run, or one protocol of many runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from rich.table import Table

from sslcli.errors import printable
from sslcli.report.console import SUBJECTS, Screen, percent, plain_text
from sslcli.system.stored import read_json, read_or_set_aside


class Score(TypedDict):
    """Accuracy of one network: a fraction in [0, 1], and its 95 % confidence interval."""

    top1: float
    interval: tuple[float, float]


class ResultOptions(TypedDict, total=False):
    """Optional keys of a result file. ssl-eval writes one such JSON file per evaluation."""

    measured: str
    description: str
    step: int
    baselines: dict[str, Score]
    net: str
    net_sha256: str


class Result(Score, ResultOptions):
    """Content of a result file. ssl-eval writes one such JSON file per evaluation.

    Only the keys that the tables need are declared.
    """

    protocol: str
    split: str


def details(result: dict[str, Any], screen: Screen) -> None:
    """Print the values that the table of top-1 accuracies does not contain.

    These are the accuracy of a linear probe, the accuracy of the teacher of a distillation, and a table with the
    utility of pre-training at each number of labels. `result` is the content of a result file. A value that it does not
    contain is not printed.
    """
    if "linear" in result:
        others = [("trained", result), *result.get("baselines", {}).items()]
        found = ", ".join(f"{SUBJECTS[name]} {percent(one['linear']['top1'])}" for name, one in others)
        screen.say(f"linear probe of the same {result['n_train']:,} labels: {found}")
    if "teacher" in result:
        screen.say(f"teacher ({result['n_labels']:,} labels): {percent(result['teacher']['top1'])}")
    if "curve" in result:
        screen.console.print(utility_table(result["curve"]), soft_wrap=False)


def utility_table(curve: list[dict[str, Any]]) -> Table:
    """Return a table with the utility of pre-training at each number of labels.

    `curve` has one mapping per number of labels. The utility at n labels is s / n, if pre-training saves s labels, see
    `sslcli.evaluation.utility`. If only a lower or an upper bound of the utility is known, the table contains the bound
    with "at least" or "at most" before it.
    """
    table = Table("labels", SUBJECTS["random"], SUBJECTS["trained"], "utility: labels saved / labels")
    prefixes = {None: "", "lower": "at least ", "upper": "at most ", "mixed": "about "}
    for point in curve:
        numbers = (percent(point[arm]["top1"]) for arm in ("random", "trained"))
        table.add_row(f"{point['labels']:,}", *numbers, f"{prefixes[point['bound']]}{point['utility']:.2f}")
    return table


def results(folder: Path, screen: Screen) -> dict[str, dict[str, Any]]:
    """Return the results of all evaluations in `folder` as name -> content of the result file, sorted by name.

    A file that is not a result is renamed, and a warning is printed.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_or_set_aside(
            partial(read_json, path, Result, remedy="remove it"),
            warn=screen.warn,
            consequence="it is skipped; run the evaluation again",
        )
        if result is not None:
            found[path.stem] = dict(result)
    return found


def summary(folder: Path, screen: Screen) -> None:
    """Print the results of all evaluations in `folder`, one row each.

    The columns are the accuracies of raw pixels, of a random initialization and of the trained network, and the step of
    the checkpoint. If a run was extended to more epochs, its results may belong to checkpoints of different steps.

    Below the table, one line per result states how the accuracy was measured and with which accuracies it can be
    compared. Results of older versions have no such line.
    """
    table = Table()
    table.add_column("top-1", overflow="fold")
    for title in (*SUBJECTS.values(), "step"):
        table.add_column(title)
    stored = results(folder, screen)
    for name, result in stored.items():
        found = {**result.get("baselines", {}), "trained": result}
        table.add_row(
            plain_text(printable(f"{name} ({result['split']})")),
            *(cell(found.get(subject)) for subject in SUBJECTS),
            step_of(result),
        )
    show(table, screen)
    for name, result in stored.items():
        if "description" in result:
            screen.say(f"{name}: {result['description']}")
    screen.say(f"results: {folder}")


def cell(found: dict[str, Any] | None) -> str:
    """Return a top-1 accuracy as text, with its 95 % confidence interval on a second line. Return "-" for None.

    `found` is a mapping with the keys `top1` and `interval`, both as fractions.
    """
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{percent(found['top1'])}\n{100 * low:.1f} to {100 * high:.1f}"


def step_of(result: dict[str, Any]) -> str:
    """Return the step of the evaluated checkpoint as text, or "-" if a weight file was evaluated.

    `result` is the content of a result file.
    """
    return f"{result['step']:,}" if "step" in result else "-"


def comparison(rows: list[dict[str, Any]], screen: Screen) -> None:
    """Print the results of one evaluation protocol for several runs, one row per run, best run first.

    `rows` contains the content of one result file per run. Long names are wrapped, never truncated.
    """
    table = Table(title=plain_text(rows[0]["measured"]))
    table.add_column("run", overflow="fold")
    for title in ("top-1", "95 % interval", "random initialization", "step"):
        table.add_column(title, overflow="fold")
    for row in sorted(rows, key=lambda row: -row["top1"]):
        low, high = row["interval"]
        random = row.get("baselines", {}).get("random")
        table.add_row(
            plain_text(printable(Path(row["results_dir"]).parent.name)),
            percent(row["top1"]),
            f"{percent(low)} to {percent(high)}",
            percent(random["top1"]) if random else "-",
            step_of(row),
        )
    show(table, screen)


def show(table: Table, screen: Screen) -> None:
    """Print a table, with long cells wrapped so that the table fits the width of the terminal."""
    screen.console.print(table, soft_wrap=False)
