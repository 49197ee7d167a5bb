"""Names of result files. Two results have the same name only if the newer result may replace the older result."""

from __future__ import annotations

import re
from typing import Any

from sslcli.data.sources.base import Source
from sslcli.evaluation.variants import join_parts

MAX_SET_NAME = 40  # maximum characters of a dataset's name, to limit file names to 255 bytes
DEFAULT_SPLIT = {"val_fraction": 0.1, "seed": 0}


def dataset_name(source: Source, *, image_size: int | None) -> str:
    """Return the part of a file name that identifies a dataset.

    The part contains the name, version, limit, split and image size of the dataset. The limit is the setting
    `dataset.limit`, the maximum number of training images. It is left out if it is None. The split is left out if it is
    the default split. The image size is left out if it equals that of pre-training.

    Args:
        source: the dataset.
        image_size: image size of pre-training in pixels; None = unknown.
    """
    readable = re.sub(r"[^\w.+-]+", "-", source.name)[:MAX_SET_NAME]
    limit = "" if source.limit is None else f"limit-{source.limit}"
    held_out = "" if source.val_fraction == DEFAULT_SPLIT["val_fraction"] else f"val-{source.val_fraction:.10g}"
    seed = "" if source.seed == DEFAULT_SPLIT["seed"] else f"seed-{source.seed}"
    # Results of older versions are of splits without common images.
    shared = "val-in-train" if source.has_val_in_train else ""
    size = "" if source.image_size == image_size else f"{source.image_size}px"
    # Use the version instead of the fingerprint. Datasets whose files have equal names and sizes have equal
    # fingerprints.
    return join_parts(f"{readable}-{source.version[:6]}", limit, held_out, shared, seed, size)


def dataset_facts(source: Source) -> dict[str, Any]:
    """Return the entries of a result file that identify the dataset and its split."""
    return {
        "dataset": source.name,
        "dataset_fingerprint": source.fingerprint,
        "dataset_version": source.version,
        "dataset_limit": source.limit,
        "val_fraction": source.val_fraction,
        "pretrain_on_val": source.pretrain_on_val,
        "split_seed": source.seed,
        "image_size": source.image_size,
    }
