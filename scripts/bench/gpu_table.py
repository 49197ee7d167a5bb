"""Markdown table of the GPU benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

COLUMNS = {  # title -> key of a result
    "images/s": "images_per_s",
    "ms": "ms",
    "peak GB": "peak_gb",
    "launches": "launches",
    "syncs": "syncs",
    "GPU idle %": "idle_percent",
    "steps": "steps",
}


def table(content: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of gpu.md: machine, versions and commands, one row per row and side, and what was left out.

    A value is the median over the processes. With several processes, the range of images/s or ms is in parentheses.

    content: the content of gpu.json.
    names: the rows to print.
    """
    for key in ("machine", "versions"):
        yield f"{key}: {', '.join(f'{name} {value}' for name, value in content[key].items())}  "
    commands = ", ".join(f"`{command}`" for command in content["commands"])
    yield f"commit {content['commit']} (code {content['code']}), {content['date']}, {commands}"
    yield ""
    yield f"| row | side | {' | '.join(COLUMNS)} | processes |"
    yield f"|---|---|{'---|' * (len(COLUMNS) + 1)}"
    for name in names:
        results = [result for result in content["results"] if result["row"] == name]
        for side in dict.fromkeys(result["side"] for result in results):
            measured = [result for result in results if result["side"] == side and "error" not in result]
            if measured:
                cells = [cell(measured, key) for key in COLUMNS.values()]
                yield f"| {name} | {side} | {' | '.join(cells)} | {len(measured)} |"
            else:
                error = next(result["error"] for result in results if result["side"] == side)
                yield f"| {name} | {side} | failed: {error.replace('|', '/')} |{' |' * len(COLUMNS)}"
    measured_sides = {result["side"] for result in content["results"]}
    left_out = [f"{side} ({why})" for side, why in content["left_out"].items() if side not in measured_sides]
    if left_out:
        yield ""
        yield f"Left out: {', '.join(left_out)}"


def cell(results: Sequence[dict[str, Any]], key: str) -> str:
    values = [result[key] for result in results if key in result]
    if not values:
        return "-"
    spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 and key in ("images_per_s", "ms") else ""
    return f"{statistics.median(values):.4g}{spread}"
