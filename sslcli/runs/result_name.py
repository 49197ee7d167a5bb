"""Names of result files; two results have the same name only if the newer one may replace the older one."""

from __future__ import annotations

import re
from typing import Any

from sslcli.data.sources.base import Source

MAX_SET_NAME = 40  # maximum characters of a dataset's name: at most 160 bytes; a file name may have 255
DEFAULT_SPLIT = {"val_fraction": 0.1, "seed": 0}


def join_parts(*parts: str) -> str:
    """Return the parts that are not empty, joined by underscores."""
    return "_".join(part for part in parts if part)


def dataset_name(source: Source, *, image_size: int | None) -> str:
    """Return the part of a file name that identifies a dataset: name, version, limit, split and image size.

    Default values are omitted.

    Args:
        source: the dataset.
        image_size: image size of pre-training in pixels, which the name omits; None if it is unknown.
    """
    readable = re.sub(r"[^\w.+-]+", "-", source.name)[:MAX_SET_NAME]
    limit = "" if source.limit is None else f"limit-{source.limit}"
    held_out = "" if source.val_fraction == DEFAULT_SPLIT["val_fraction"] else f"val-{source.val_fraction:.10g}"
    seed = "" if source.seed == DEFAULT_SPLIT["seed"] else f"seed-{source.seed}"
    size = "" if source.image_size == image_size else f"{source.image_size}px"
    # The version, not the fingerprint: datasets whose files have the same names and sizes have the same fingerprint.
    return join_parts(f"{readable}-{source.version[:6]}", limit, held_out, seed, size)


def dataset_facts(source: Source) -> dict[str, Any]:
    """Return the entries of a result file that identify the dataset and its split."""
    return {
        "dataset": source.name,
        "dataset_fingerprint": source.fingerprint,
        "dataset_version": source.version,
        "dataset_limit": source.limit,
        "val_fraction": source.val_fraction,
        "split_seed": source.seed,
        "image_size": source.image_size,
    }
