"""SVG plot of the result of the evaluation protocol=utility. The x-axis is the number of labels used for training.

The upper panel shows the accuracies of two networks, which are called arms: one is pre-trained and then fine-tuned, and
one is trained from scratch. The lower panel shows the utility: the number of labels that pre-training saves, divided by
the number of labels on the x-axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 560, 220, 64, 24, 34, 56
ARMS = {"trained": ("#1b6ca8", "pre-trained"), "random": ("#b3541e", "from scratch")}
Scale = Callable[[float], float]


def curves(points: Sequence[dict[str, Any]]) -> str:
    """Return the SVG text of a plot of accuracy and utility against the number of labels.

    `points` contains one mapping per number of labels, with the accuracies and the utility at this number. It is the
    value of the key `curve` in the result of protocol=utility. Each utility is drawn as a circle. If only a bound of
    the utility is known, the circle is open.
    """
    counts = [point["labels"] for point in points]
    low, high = math.log(counts[0]), math.log(counts[-1])

    def x(count: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(count) - low) / max(high - low, 1e-9)

    best = max(point[arm]["top1"] + (point[arm]["std"] or 0) for point in points for arm in ARMS)
    accuracy = axis(0.0, max(best, 1e-3), TOP)
    values = [0.0, *(point["utility"] for point in points)]
    utility = axis(min(values), max(max(values), min(values) + 1e-3), TOP + PANEL + GAP)
    height = TOP + 2 * PANEL + 2 * GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *frame(TOP, "accuracy", accuracy, ticks(0.0, best), counts, x, percent=True),
        *(part for arm in ARMS for part in arm_curve(points, arm, x, accuracy)),
        *frame(
            TOP + PANEL + GAP, "utility: labels saved / labels", utility, ticks(min(values), max(values)), counts, x
        ),
        *utility_curve(points, x, utility),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def axis(low: float, high: float, top: float) -> Scale:
    """Return a function that maps values to y coordinates of a panel of the plot.

    `low` and `high` are the smallest and the largest value to show. The panel has a small margin below `low` and above
    `high`. `top` is the y coordinate of the panel's upper edge.
    """
    air = 0.06 * (high - low)
    return lambda value: top + PANEL * (1 - (value - low + air) / (high - low + 2 * air))


def ticks(low: float, high: float) -> list[float]:
    """Return about five round values between `low` and `high`."""
    rough = max(high - low, 1e-3) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def frame(
    top: float,
    title: str,
    y: Scale,
    marks: Sequence[float],
    counts: Sequence[int],
    x: Scale,
    *,
    percent: bool = False,
) -> list[str]:
    """Return the SVG elements of a panel's title, grid and tick labels.

    `top` is the y coordinate of the panel's upper edge. `x` and `y` map values to coordinates. `marks` are the values
    of the y ticks, and `counts` are the values of the x ticks. If `percent` is True, y ticks are fractions that are
    shown as percentages.
    """
    bottom, right = top + PANEL, WIDTH - RIGHT
    parts = [f'<text x="{LEFT}" y="{top - 10}" font-weight="bold">{title}</text>']
    for value in marks:
        text = f"{100 * value:g} %" if percent else f"{value:g}"
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#555">{text}</text>')
    parts += [
        f'<text x="{x(count):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{count:,}</text>'
        for count in counts
    ]
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 36}" text-anchor="middle" fill="#555">labels</text>')
    parts.append(f'<path d="M{LEFT} {top}V{bottom}H{right}" fill="none" stroke="#888"/>')
    return parts


def arm_curve(points: Sequence[dict[str, Any]], arm: str, x: Scale, y: Scale) -> list[str]:
    """Return the SVG elements of one curve of mean accuracies, with its error bars and its legend entry.

    `points` has one mapping per number of labels. `arm` selects the curve: "trained" (pre-trained, then fine-tuned) or
    "random" (trained from scratch). `x` and `y` map values to coordinates. An error bar shows one standard deviation
    above and below the mean.
    """
    color, name = ARMS[arm]
    line = " ".join(f"{x(p['labels']):.1f},{y(p[arm]['top1']):.1f}" for p in points)
    parts = [f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>']
    for point in points:
        at, mean, std = x(point["labels"]), point[arm]["top1"], point[arm]["std"] or 0.0
        parts.append(f'<path d="M{at:.1f} {y(mean - std):.1f}V{y(mean + std):.1f}" stroke="{color}"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{y(mean):.1f}" r="3.5" fill="{color}"/>')
    right = WIDTH - RIGHT - (110 if arm == "trained" else 0)
    return [*parts, f'<text x="{right}" y="{TOP - 10}" text-anchor="end" fill="{color}">{name}</text>']


def utility_curve(points: Sequence[dict[str, Any]], x: Scale, y: Scale) -> list[str]:
    """Return the SVG elements of the utility curve.

    `points` has one mapping per number of labels. `x` and `y` map values to coordinates. Each utility is drawn as a
    circle. The circle is open if only a lower or an upper bound of the utility is known. A lower bound also has an
    arrow that points up.
    """
    line = " ".join(f"{x(p['labels']):.1f},{y(p['utility']):.1f}" for p in points)
    zero = f'<path d="M{LEFT} {y(0.0):.1f}H{WIDTH - RIGHT}" stroke="#888" stroke-dasharray="4 3"/>'
    parts = [zero, f'<polyline points="{line}" fill="none" stroke="#333" stroke-width="1.5"/>']
    for point in points:
        at, value = x(point["labels"]), point["utility"]
        fill = "#333" if point["bound"] is None else "white"
        if point["censored"]:
            parts.append(f'<path d="M{at:.1f} {y(value):.1f}v-16m-4 5l4 -5l4 5" fill="none" stroke="#333"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{y(value):.1f}" r="3.5" fill="{fill}" stroke="#333"/>')
    return parts
