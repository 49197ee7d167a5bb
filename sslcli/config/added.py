"""Keys of datasets that were added after version 0.2, with the values that correspond to older versions.

The `config.yaml` of a run that an older version started lacks these keys. The run must still read the same images.
Therefore, missing keys get the old values of this module, and not the defaults of the yaml files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Added(NamedTuple):
    """A key that was added to the yaml files of datasets after version 0.2."""

    old: Any  # the value with which the dataset is read as in older versions
    default: Any  # the value in the yaml files


# Extensions of the image files that version 0.2 listed.
OLD_EXTENSIONS = ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
# Key -> its old value and its default.
KEYS = {
    "extensions": Added(list(OLD_EXTENSIONS), None),
    "linked_folders": Added("always", "once"),
    "test": Added(None, None),
    "image": Added("auto", "auto"),
    "label": Added("auto", "auto"),
    "split_column": Added(None, None),
    "channels": Added(3, 3),
    "value_range": Added("full", "auto"),
    "pretrain_on_val": Added(False, True),
}
_SEARCH = ("extensions", "linked_folders")
_FILES = "sslcli.data.sources.files"
_FORMAT = ("channels", "value_range")
_SPLIT = ("pretrain_on_val",)
# Keys that each built-in class accepts. A class of a plug-in accepts the keys in its yaml file.
CLASSES = {
    f"{_FILES}.Folder": (*_SPLIT, *_SEARCH, *_FORMAT),
    f"{_FILES}.Flat": (*_SPLIT, *_SEARCH, *_FORMAT),
    f"{_FILES}.ImageNet": (*_SPLIT, *_SEARCH, *_FORMAT),
    f"{_FILES}.ListFile": (*_SPLIT, "test", "image", "label", "split_column", *_FORMAT),
    "sslcli.data.sources.hf.Hf": (*_SPLIT, *_FORMAT),
    "sslcli.data.shards.source.HfStream": (*_SPLIT, *_FORMAT),
    "sslcli.data.sources.parallel.Parallel": (*_SPLIT, *_SEARCH),
    "sslcli.data.sources.base.Shapes": _SPLIT,
    "sslcli.data.sources.base.TorchvisionSet": _SPLIT,
}


def with_added_keys(stored: Any, now: Any = None) -> Any:
    """Return the mapping `dataset` that a run stored, with the keys that were added after version 0.2.

    A mapping that an older version stored lacks these keys. Each missing key is added with the value with which the
    dataset is read as in the older version. `KEYS` contains this value.

    Args:
        stored: the mapping in the `config.yaml` or in a checkpoint of the run. A value that is not a mapping is
            returned unchanged.
        now: the mapping `dataset` of the command line. If it is given, only keys that it contains are added. None = add
            all keys that the class of the dataset accepts. The accepted keys are known only for built-in classes.
    """
    if not isinstance(stored, dict):
        return stored
    known = accepted_keys(stored) if not isinstance(now, dict) else now.keys()
    return {key: added.old for key, added in KEYS.items() if key in known} | stored


def resumed_dataset(dataset: dict[str, Any], stored: Any, set_keys: Collection[str]) -> dict[str, Any]:
    """Return the mapping `dataset` with which an existing run resumes.

    The keys in `KEYS` were added after version 0.2. Each has a default in the yaml files, and an old value with which
    the dataset is read as in older versions. If a key in `dataset` has its default, it gets its old value in two cases:

    - `stored` lacks the key, because an older version of sslcli started the run.
    - `stored` contains the old value.

    Keys that the command line sets are not changed.

    Args:
        dataset: the mapping composed from yaml files and the command line.
        stored: the mapping in the `config.yaml` of the run.
        set_keys: the dotted keys that the command line sets, such as `dataset.extensions`.
    """
    if not isinstance(stored, dict):
        return dataset
    found = dict(dataset)
    for key in sorted(accepted_keys(dataset)):
        old, default = KEYS[key]
        is_default = found.get(key, default) == default and f"dataset.{key}" not in set_keys
        if is_default and stored.get(key, old) == old:
            found[key] = old
    return found


def with_defaults(dataset: Any) -> Any:
    """Return the mapping `dataset` of a command line, with all keys that were added after version 0.2.

    A yaml file of the user may lack these keys. They are then added with the defaults of the yaml files of sslcli. If
    the `config.yaml` of a new run lacked the keys, the run would be taken for a run of an older version. Only mappings
    whose `_target_` is a built-in class are changed.
    """
    if not isinstance(dataset, dict):
        return dataset
    keys = CLASSES.get(str(dataset.get("_target_")), ())
    return dataset | {key: KEYS[key].default for key in keys if key not in dataset}


def accepted_keys(dataset: Mapping[str, Any]) -> set[str]:
    """Return the keys in `KEYS` (keys that were added after version 0.2) that the class of a dataset accepts.

    `dataset` is the mapping `dataset` of a configuration. For a built-in class, the keys are listed in `CLASSES`. All
    keys in `KEYS` that the mapping contains also count as accepted.
    """
    return {*CLASSES.get(str(dataset.get("_target_")), ()), *(KEYS.keys() & dataset.keys())}


def without_added_keys(dataset: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping `dataset` without some of the keys that were added after version 0.2.

    A key in `KEYS` is removed if its value is the default of the yaml files and if the mapping `stored` lacks it.
    """
    return {
        key: value for key, value in dataset.items() if key in stored or key not in KEYS or value != KEYS[key].default
    }
