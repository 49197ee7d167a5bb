"""What the result of an evaluation is called: a name that two results share only where one may replace the other."""

from __future__ import annotations

import re
from typing import Any

from sslcli.data.sources.base import Source

SET_NAME = 40  # letters of the name of an image set: with four bytes each a file name still has room for the rest
SPLIT = {"val_fraction": 0.1, "seed": 0}  # how a set is divided by default


def joined(*parts: str) -> str:
    """The parts that are not empty, in one name."""
    return "_".join(part for part in parts if part)


def name_of_set(source: Source, *, image_size: int | None) -> str:
    """An image set as part of a file name: what it is called, which images it has, and how they are taken.

    Args:
        source: the image set.
        image_size: the side in pixels that needs no mention, that of pre-training; None where it is not known.
    """
    readable = re.sub(r"[^\w.+-]+", "-", source.name)[:SET_NAME]
    limit = "" if source.limit is None else f"limit-{source.limit}"
    held_out = "" if source.val_fraction == SPLIT["val_fraction"] else f"val-{source.val_fraction:.10g}"
    seed = "" if source.seed == SPLIT["seed"] else f"seed-{source.seed}"
    size = "" if source.image_size == image_size else f"{source.image_size}px"
    # Not the fingerprint, which two sets of files have in common whose names and sizes are the same.
    return joined(f"{readable}-{source.version[:6]}", limit, held_out, seed, size)


def facts_of_set(source: Source) -> dict[str, Any]:
    """The same for the result file."""
    return {
        "dataset": source.name,
        "dataset_fingerprint": source.fingerprint,
        "dataset_version": source.version,
        "dataset_limit": source.limit,
        "val_fraction": source.val_fraction,
        "split_seed": source.seed,
        "image_size": source.image_size,
    }
