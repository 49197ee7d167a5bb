"""Print what cifar10_short_runs.sh measured as a markdown table: `python scripts/short_runs_table.py OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROTOCOLS = ("knn", "linear", "semi")


def cell(result: dict[str, Any] | None) -> str:
    """Top-1 in per cent with its interval, or a dash."""
    if result is None:
        return "-"
    low, high = (100 * value for value in result["interval"])
    return f"{100 * result['top1']:.1f} ({low:.1f} to {high:.1f})"


def row(run: Path) -> str:
    """One method: images seen, then for each protocol the trained net and its random initialisation."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    config = (run / "config.yaml").read_text()
    batch = next(int(line.split(":")[1]) for line in config.splitlines() if line.startswith("  batch_size:"))
    cells = [f"`{run.name}`", f"{last['step'] * batch:,}", f"{last['wall'] / 60:.0f}"]
    for protocol in PROTOCOLS:
        path = run / "eval" / f"{protocol}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        cells += [cell(found or None), cell(found.get("baselines", {}).get("random"))]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    heads = [head for protocol in PROTOCOLS for head in (protocol, f"{protocol}, random initialisation")]
    print("| method | images seen | minutes | " + " | ".join(heads) + " |")
    print("|---" * (3 + len(heads)) + "|")
    for done in sorted(Path(sys.argv[1]).glob("*/done")):
        if done.parent.suffix == ".timing":
            continue
        print(row(done.parent))
