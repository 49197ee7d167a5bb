"""Subsets of labelled images: every class with its share, and nested, so that a larger one holds a smaller one.

The order of the images of a class is a hash of (seed, position): no generator, no dependence on what else there is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslcli.data import rng


def subset(
    positions: Tensor, labels: Tensor, *, seed: int, fraction: float | None = None, per_class: int | None = None
) -> Tensor:
    """Rows (k,) int64, ascending, of the images at `positions` (n,) with `labels` (n,) that a subset has.

    Give `fraction` in (0, 1], of every class, rounded, and at least one image; or `per_class`, images of every class.
    Subsets of one seed are nested. Raises ValueError for values out of range and for more than a class has.
    """
    if (fraction is None) == (per_class is None):
        raise ValueError(f"fraction is {fraction} and labels_per_class {per_class}, but exactly one must be given")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, but it must be above 0 and at most 1: 0.01 and 0.1 are usual")
    chosen = []
    for label in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == label).flatten()
        count = per_class if per_class is not None else max(1, round((fraction or 1.0) * len(members)))
        if not 1 <= count <= len(members):
            raise ValueError(
                f"labels_per_class is {count}, but class {label} has {len(members)} labelled training images: "
                f"choose from 1 to {len(members)}"
            )
        chosen.append(members[rng.mix(seed, positions[members]).argsort()[:count]])
    return torch.cat(chosen).sort().values


def held_out(rows: Tensor, labels: Tensor, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split `rows` (k,) of the images with `labels` (n,) into (kept, held out), of every class a share.

    A class with one image keeps it; any other holds out at least one.
    """
    out = []
    for label in sorted(set(labels[rows].tolist())):
        members = rows[labels[rows] == label]
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        out.append(members[rng.mix(seed, 1, members).argsort()[:count]])
    held = torch.cat(out).sort().values
    return rows[~torch.isin(rows, held)], held


def log_spaced(smallest: int, largest: int, points: int) -> list[int]:
    """`points` whole numbers from `smallest` to `largest`, as evenly spaced in their logarithm as whole numbers can be.

    Fewer where two would be the same. Raises ValueError unless 1 <= smallest < largest and points >= 2.
    """
    if not 1 <= smallest < largest or points < 2:
        raise ValueError(
            f"the label counts go from smallest={smallest} to {largest} in points={points}: smallest must be at least "
            "1 and below the number of labelled images, and there must be at least 2 points"
        )
    ratio = math.log(largest / smallest) / (points - 1)
    return sorted({round(smallest * math.exp(ratio * place)) for place in range(points)})
