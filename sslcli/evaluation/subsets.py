"""Nested, class-balanced subsets of labeled images.

The images of a class are ordered by a hash of the seed and of the position of the image (its index in the dataset). The
hash of an image depends on no random generator and on no other image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslcli.data import rng


def subset(
    positions: Tensor, labels: Tensor, *, seed: int, fraction: float | None = None, per_class: int | None = None
) -> Tensor:
    """Return a subset of the images at `positions` (n,) with `labels` (n,), as row numbers (k,) int64.

    The row numbers are indices into `positions` and `labels`, in ascending order.

    Set either `fraction` in (0, 1], the fraction of each class, or `per_class`, the number of images of each class.
    With `fraction`, the number of images of a class is rounded and at least one. Subsets with the same seed are nested:
    a larger subset contains all images of a smaller one. Raises ValueError if a value is out of range or a class has
    fewer than `per_class` images.
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
                f"labels_per_class is {count}, but class {label} has {len(members)} labeled training images: "
                f"choose from 1 to {len(members)}"
            )
        chosen.append(members[rng.mix(seed, positions[members]).argsort()[:count]])
    return torch.cat(chosen).sort().values


def held_out(rows: Tensor, labels: Tensor, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split `rows` (k,) into (kept, held out), stratified by class. `rows` are indices into `labels` (n,).

    If a class has only one image, this image is kept. At least one image of every other class is held out.
    """
    out = []
    for label in sorted(set(labels[rows].tolist())):
        members = rows[labels[rows] == label]
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        out.append(members[rng.mix(seed, 1, members).argsort()[:count]])
    held = torch.cat(out).sort().values
    return rows[~torch.isin(rows, held)], held


def log_spaced(smallest: int, largest: int, points: int) -> list[int]:
    """Return `points` integers from `smallest` to `largest`, log-spaced and rounded.

    Duplicates are removed. Raises ValueError unless 1 <= smallest < largest and points >= 2.
    """
    if not 1 <= smallest < largest or points < 2:
        raise ValueError(
            f"the label counts go from smallest={smallest} to {largest} in points={points}: smallest must be at least "
            "1 and below the number of labeled images, and there must be at least 2 points"
        )
    ratio = math.log(largest / smallest) / (points - 1)
    return sorted({round(smallest * math.exp(ratio * place)) for place in range(points)})
