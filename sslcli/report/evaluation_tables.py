"""The tables ssl-eval ends with: all protocols of one subject, or one protocol of many runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from sslcli.report.console import SUBJECTS, Screen, percent


def details(result: dict[str, Any], screen: Screen) -> None:
    """What the table of top-1 does not show and the protocol was run for."""
    if "linear" in result:
        others = [("trained", result), *result.get("baselines", {}).items()]
        found = ", ".join(f"{SUBJECTS[name]} {percent(one['linear']['top1'])}" for name, one in others)
        screen.say(f"linear probe of the same {result['n_train']:,} labels: {found}")
    if "teacher" in result:
        screen.say(f"teacher ({result['n_labels']:,} labels): {percent(result['teacher']['top1'])}")
    if "curve" in result:
        screen.console.print(saved(result["curve"]), soft_wrap=False)


def saved(curve: list[dict[str, Any]]) -> Table:
    """The utility of pre-training at each number of labels; bounds as such."""
    table = Table("labels", SUBJECTS["random"], SUBJECTS["trained"], "utility: labels saved / labels")
    signs = {None: "", "lower": "at least ", "upper": "at most "}
    for point in curve:
        numbers = (percent(point[arm]["top1"]) for arm in ("random", "trained"))
        table.add_row(f"{point['labels']:,}", *numbers, f"{signs[point['bound']]}{point['utility']:.2f}")
    return table


def results(home: Path, screen: Screen) -> dict[str, dict[str, Any]]:
    """All results that lie in `home`, by name, in order; a file that holds none is left out with a warning."""
    found = {}
    for path in sorted(home.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = None
        if isinstance(result, dict) and result.keys() >= {"protocol", "split", "top1", "interval"}:
            found[path.stem] = result
        else:
            screen.warn(f"{path} holds no result of ssl-eval and is left out: delete it, or measure it again")
    return found


def summary(home: Path, screen: Screen) -> None:
    """All results so far of this subject, a row each: raw pixels, random initialization, trained."""
    table = Table()
    table.add_column("top-1", overflow="fold")
    for title in SUBJECTS.values():
        table.add_column(title)
    for name, result in results(home, screen).items():
        found = {**result.get("baselines", {}), "trained": result}
        table.add_row(f"{name} ({result['split']})", *(cell(found.get(subject)) for subject in SUBJECTS))
    show(table, screen)
    screen.say(f"results: {home}")


def cell(found: dict[str, Any] | None) -> str:
    """A number and below it how sure it is."""
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{percent(found['top1'])}\n{100 * low:.1f} to {100 * high:.1f}"


def comparison(rows: list[dict[str, Any]], screen: Screen) -> None:
    """One row a run, best first; names are folded where the screen is narrow, never cut."""
    table = Table(title=rows[0]["measured"])
    table.add_column("run", overflow="fold")
    for title in ("top-1", "95 % interval", "random initialization"):
        table.add_column(title, overflow="fold")
    for row in sorted(rows, key=lambda row: -row["top1"]):
        low, high = row["interval"]
        random = row.get("baselines", {}).get("random")
        table.add_row(
            Path(row["home"]).parent.name,
            percent(row["top1"]),
            f"{percent(low)} to {percent(high)}",
            percent(random["top1"]) if random else "-",
        )
    show(table, screen)


def show(table: Table, screen: Screen) -> None:
    """Print a table; the screen leaves lines to the terminal to wrap, but cells must be wrapped here."""
    screen.console.print(table, soft_wrap=False)
