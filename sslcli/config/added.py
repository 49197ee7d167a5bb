"""Keys of datasets that were added after version 0.2, and the values that describe what older versions did.

A run that an older version started has no such keys in its `config.yaml`. It must read the same images as before, so
these keys get the values of this module and not the defaults of the yaml files.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple


class Added(NamedTuple):
    """One key that was added to the yaml files of datasets."""

    old: Any  # the value that describes what older versions did
    default: Any  # the value in the yaml files


EXTENSIONS = ["bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"]
KEYS = {
    "extensions": Added(EXTENSIONS, None),
}
_FILES = "sslcli.data.sources.files"
# The keys that each class accepts. For a class of a plug-in, `resumed_dataset` uses the keys of its yaml file.
CLASSES = {
    f"{_FILES}.Folder": ("extensions",),
    f"{_FILES}.Flat": ("extensions",),
    f"{_FILES}.ImageNet": ("extensions",),
    "sslcli.data.sources.parallel.Parallel": ("extensions",),
}


def with_added_keys(dataset: Any) -> Any:
    """Return the node `dataset` of a stored configuration. Missing keys are added with their old values."""
    if not isinstance(dataset, dict):
        return dataset
    return {key: KEYS[key].old for key in CLASSES.get(str(dataset.get("_target_")), ())} | dataset


def resumed_dataset(dataset: dict[str, Any], stored: Any, set_keys: Container[str]) -> dict[str, Any]:
    """Return the node `dataset` with which an existing run resumes.

    Args:
        dataset: the composed node.
        stored: the node in the configuration of the run.
        set_keys: the dotted keys that the command line sets.

    A key that `stored` lacks gets its old value if it has the default of the yaml files. Keys that the command line
    sets, and all other keys, are not changed.
    """
    found = dict(dataset)
    if not isinstance(stored, dict):
        return found
    for key, added in KEYS.items():
        is_default = key in found and found[key] == added.default and f"dataset.{key}" not in set_keys
        if is_default and key not in stored:
            found[key] = added.old
    return found
