"""Names of result files; two results have the same name only if the newer one may replace the older one."""

from __future__ import annotations

import re
from typing import Any

from sslcli.data.sources.base import Source

MAX_SET_NAME = 40  # maximum characters of an image set's name, at most 160 of the 255 bytes of a file name
DEFAULT_SPLIT = {"val_fraction": 0.1, "seed": 0}


def join_parts(*parts: str) -> str:
    """Return the parts that are not empty, joined by underscores."""
    return "_".join(part for part in parts if part)


def dataset_name(source: Source, *, image_size: int | None) -> str:
    """Return the part of a file name that identifies an image set: name, version, limit, split and image size.

    Values that are the default are omitted.

    Args:
        source: the image set.
        image_size: default side length in pixels, that of pre-training; None if it is unknown.
    """
    readable = re.sub(r"[^\w.+-]+", "-", source.name)[:MAX_SET_NAME]
    limit = "" if source.limit is None else f"limit-{source.limit}"
    held_out = "" if source.val_fraction == DEFAULT_SPLIT["val_fraction"] else f"val-{source.val_fraction:.10g}"
    seed = "" if source.seed == DEFAULT_SPLIT["seed"] else f"seed-{source.seed}"
    size = "" if source.image_size == image_size else f"{source.image_size}px"
    # Not the fingerprint, which is the same for two sets whose files have the same names and sizes.
    return join_parts(f"{readable}-{source.version[:6]}", limit, held_out, seed, size)


def dataset_facts(source: Source) -> dict[str, Any]:
    """Return the entries of a result file that identify the image set and its split."""
    return {
        "dataset": source.name,
        "dataset_fingerprint": source.fingerprint,
        "dataset_version": source.version,
        "dataset_limit": source.limit,
        "val_fraction": source.val_fraction,
        "split_seed": source.seed,
        "image_size": source.image_size,
    }
