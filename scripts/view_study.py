"""Study of view strength: one run per strength, and plots of k-NN accuracy against strength and mutual information.

    python scripts/view_study.py
    python scripts/view_study.py --values 0,0.5,1,2 dataset=cifar10 backbone=resnet18 train.epochs=50
    python scripts/view_study.py --key views.views.0.rand_augment views=infomin method=moco_v2 --values 0,1,2,4
    python scripts/view_study.py --plot runs/view_study

The runs are those of `ssl-train --multirun experiment=view_study KEY=VALUES`, with any further overrides. The same
command resumes unfinished runs. The results are view_study.csv and view_study.svg in the directory of the runs.

A contrastive loss L over K candidates gives a lower bound on the mutual information I of two views (CPC,
arXiv:1807.03748): I >= I_NCE = ln K - L, in nats. The bound cannot exceed ln K. Values for different K or different
temperatures are not comparable.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sslcli.report.metrics import newest, read

NEGATIVES = "negatives per query"  # key in `effective` of contrastive methods
WIDTH, HEIGHT, LEFT, TOP, GAP = 380, 260, 70, 40, 90  # size and margins of a panel in pixels


class Point(NamedTuple):
    """One run."""

    value: float
    knn: float  # top-1 accuracy in [0, 1]
    loss: float  # loss, mean over the last epoch
    candidates: int  # K: one positive and all negatives

    @property
    def information(self) -> float:
        """Lower bound I_NCE on the mutual information of the views, in nats."""
        return math.log(self.candidates) - self.loss


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key", default="views.strength", help="key to vary (default: %(default)s)")
    parser.add_argument("--values", default="0,0.125,0.25,0.5,1,1.5", help="values of the key (default: %(default)s)")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/view_study"), help="directory of the runs (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="plot the finished runs in DIR without training")
    parser.add_argument("overrides", nargs="*", help="passed to ssl-train")
    options = parser.parse_args(arguments)
    folder: Path = options.plot or options.dir
    if options.plot is None:
        sweep = [f"{options.key}={options.values}", f"hydra.sweep.dir={folder}"]
        line = [sys.executable, "-m", "sslcli.cli.train", "--multirun", "experiment=view_study", *sweep]
        code = subprocess.run([*line, *options.overrides]).returncode
        if code != 0:
            return code
    points = points_of(folder, options.key)
    if not points:
        print(f"no finished run in {folder} has {options.key}", file=sys.stderr)
        return 2
    write_csv(points, folder / "view_study.csv")
    (folder / "view_study.svg").write_text(picture(means(points), options.key), encoding="utf-8")
    for point in points:
        print(f"{options.key}={point.value:g}  k-NN {100 * point.knn:.1f} %  I_NCE {point.information:.2f} nats")
    print(f"plot: {folder / 'view_study.svg'}")
    return 0


def points_of(folder: Path, key: str) -> list[Point]:
    """Return the finished runs in `folder` that have `key`, sorted by its value.

    Raise SystemExit for a run whose method has no fixed number of negatives.
    """
    points = []
    for path in sorted(folder.glob("*/done")):
        run = path.parent
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        value, knn = value_of(config, key), newest(run / "metrics.jsonl", "monitor/knn_top1")
        if value is None or knn is None:
            continue
        negatives = config["effective"].get(NEGATIVES)
        if not isinstance(negatives, int):
            raise SystemExit(f"the method of {run} has no fixed number of negatives: choose a contrastive method")
        points.append(Point(value, knn, last_loss(read(run / "metrics.jsonl")), negatives + 1))
    return sorted(points)


def value_of(config: Any, key: str) -> float | None:
    """Return the number at a dotted key of a configuration, or None if it has no such number."""
    for part in key.split("."):
        if isinstance(config, list) and part.isdecimal() and int(part) < len(config):
            config = config[int(part)]
        else:
            config = config.get(part) if isinstance(config, dict) else None
    return float(config) if isinstance(config, (int, float)) and not isinstance(config, bool) else None


def last_loss(lines: list[dict[str, Any]]) -> float:
    """Return the mean of train/loss over the last epoch."""
    logged = [line for line in lines if line.get("train/loss") is not None]
    losses = [line["train/loss"] for line in logged if line["epoch"] > logged[-1]["epoch"] - 1]
    return sum(losses) / len(losses)


def means(points: list[Point]) -> list[Point]:
    """Return one point per value: the mean over its runs, e.g. over seeds."""
    rows = [[point for point in points if point.value == value] for value in sorted({p.value for p in points})]
    return [
        Point(row[0].value, sum(p.knn for p in row) / len(row), sum(p.loss for p in row) / len(row), row[0].candidates)
        for row in rows
    ]


def write_csv(points: list[Point], path: Path) -> None:
    """Write a CSV file with one row per run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["value", "knn_top1", "loss", "candidates", "i_nce"])
        table.writerows([*point, point.information] for point in points)


def picture(points: list[Point], key: str) -> str:
    """Return an SVG with two panels: k-NN against the value, and against I_NCE. One title has its maximum, ln K."""
    accuracy = [100 * point.knn for point in points]
    labels = [f"{point.value:g}" for point in points]
    bound = f"I_NCE in nats, at most ln {points[0].candidates} = {math.log(points[0].candidates):.2f}"
    strength = panel([point.value for point in points], accuracy, labels, key, LEFT)
    information = panel([point.information for point in points], accuracy, labels, bound, LEFT + WIDTH + GAP)
    width, height = 2 * (WIDTH + GAP) + LEFT, HEIGHT + 2 * TOP + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{strength}{information}</svg>\n'
    )


def panel(x: list[float], y: list[float], labels: list[str], title: str, left: float) -> str:
    """Return the SVG elements of a plot of points, connected by lines in the given order."""
    to_x, to_y = scale(x, left, left + WIDTH), scale(y, TOP + HEIGHT, TOP)
    positions = [(to_x(a), to_y(b)) for a, b in zip(x, y, strict=True)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in positions)
    parts = [
        f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 40}" text-anchor="middle">{escaped(title)}</text>',
        f'<text x="{left}" y="{TOP - 12}">k-NN top-1, %</text>',
        f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="2"/>',
    ]
    for (a, b), label in zip(positions, labels, strict=True):
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="#1f5fa8"/>')
        parts.append(f'<text x="{a:.1f}" y="{b - 8:.1f}" text-anchor="middle">{label}</text>')
    for value in ticks(x):
        parts.append(f'<text x="{to_x(value):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{value:g}</text>')
    for value in ticks(y):
        parts.append(f'<text x="{left - 6}" y="{to_y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    return "\n".join(parts) + "\n"


def scale(values: list[float], start: float, end: float) -> Any:
    """Return the function that maps the range of `values`, with a margin, to the pixels from `start` to `end`."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.5
    low, high = low - margin, high + margin
    return lambda value: start + (value - low) / (high - low) * (end - start)


def ticks(values: list[float]) -> list[float]:
    """Return three to seven round numbers in the range of `values`, or one if all are equal."""
    low, high = min(values), max(values)
    if low == high:
        return [low]
    minimum = (high - low) / 5
    power = 10 ** math.floor(math.log10(minimum))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= minimum)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def escaped(text: str) -> str:
    """Return text with the special characters of SVG escaped."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
