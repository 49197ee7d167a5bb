"""Dataset of a training run, with the overrides of an `ssl-eval dataset.KEY=value` command line applied."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslcli.config import schema
from sslcli.config.channels import with_channel_statistics
from sslcli.config.keys import check_path
from sslcli.config.messages import unknown_message
from sslcli.config.paths import absolute, map_paths, numbers_as_text, paths_of, same_paths, without_paths
from sslcli.config.targets import check_target, targets
from sslcli.errors import ConfigError

PREFIX = "dataset."
FINGERPRINT = "image fingerprint"  # a key in the section `effective` of a run's configuration
# Keys that affect how the images of a dataset are read, but not which images the dataset contains.
READING = (
    "workers",
    "resident",
    "max_bad",
    "verify",
    "scaled_decode",
    "keep_decoded",
    "keep_gb",
    "keep_dir",
    "download",
    "memory_gb",
)
# Keys that select files. Two different values may select the same images. To detect this, compare the fingerprints of
# the images.
SELECTING = ("extensions", "linked_folders")


class Change(NamedTuple):
    """One override `dataset.KEY=value` of a command line, as plain values."""

    prefix: str  # "", "+" (add), "++" (set or add) or "~" (delete)
    key: str  # without the leading `dataset.`
    value: Any


def dataset_of_run(saved: dict[str, Any], changes: list[Change], *, trust: list[str]) -> dict[str, Any]:
    """Return the mapping `dataset` of a run's configuration after applying and validating `changes`.

    Paths in the returned mapping are absolute.

    Args:
        saved: the configuration that the run stored.
        changes: overrides of the command line. If there are none, the mapping is not validated.
        trust: names of the packages that the user trusts. Their classes may be named as `_target_`.

    Raises ConfigError if a key is unknown or a value is invalid.
    """
    node = OmegaConf.create({"dataset": saved["dataset"]})
    for change in map(Change._make, changes):
        path = PREFIX + change.key
        if change.prefix == "~":
            _delete(node, change.key)
            continue
        if change.prefix == "":
            check_path("eval", path, node, may_add=True)
        try:
            OmegaConf.update(node, path, change.value, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path} cannot be set to {change.value!r}: {str(error).splitlines()[0]}") from error
    plain = OmegaConf.to_container(node, resolve=False)
    assert isinstance(plain, dict)
    plain = numbers_as_text("eval", {"dataset": plain["dataset"]})
    if changes:
        plain["dataset"] = with_channel_statistics(plain["dataset"])
        for where, target in targets("", plain):
            check_target(target, trust, where)
        schema.check_group("dataset", plain["dataset"])
    found: dict[str, Any] = map_paths(plain["dataset"], absolute)
    return found


def _delete(node: Any, key: str) -> None:
    """Delete one key of a mapping that is the value of a dataset setting.

    `node` is the configuration. `key` is the dotted key without the leading `dataset.`, such as `modalities.ir`. Raises
    ConfigError if `key` is a whole setting, such as `modalities`, or does not exist.
    """
    where, _, name = key.rpartition(".")
    inside = OmegaConf.select(node, PREFIX + where) if where else None
    if not isinstance(inside, DictConfig):
        raise ConfigError(f"~{PREFIX}{key}: a setting cannot be deleted: set it with {PREFIX}{key}=...")
    if name not in inside:
        raise ConfigError(unknown_message(PREFIX + where, name, map(str, inside)))
    del inside[name]


def has_same_keys(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if two datasets are equal except for their paths and some keys.

    The ignored keys are those in `READING`, which affect only how images are read, and those in `SELECTING`, which
    select files. `one` and `other` are mappings `dataset` of configurations.
    """
    first, second = (
        {key: value for key, value in image_settings(node).items() if key not in SELECTING} for node in (one, other)
    )
    return bool(without_paths(first) == without_paths(second))


def has_same_paths(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if two datasets are equal except for the keys in `READING`, which affect only how images are read.

    Two paths are equal if they refer to the same file or folder. `one` and `other` are mappings `dataset` of
    configurations.
    """
    return same_paths(image_settings(one), image_settings(other))


def image_settings(node: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a dataset that determine which images it contains.

    `node` is the mapping `dataset` of a configuration. The keys in `READING` are omitted, because they affect only how
    images are read.
    """
    return {key: value for key, value in node.items() if key not in READING}


def missing_path_hint(node: dict[str, Any]) -> str:
    """Return a hint about a path in a dataset's settings that does not exist, or "" if all paths exist.

    `node` is the mapping `dataset` of a run's configuration. If several paths do not exist, the hint is about the first
    of them. The hint is the last part of an error message.
    """
    absent = [(key, path) for key, path in paths_of(node) if os.path.isabs(path) and not os.path.exists(path)]
    if not absent:
        return ""
    key, path = absent[0]
    return f". {PREFIX}{key} of the run is {path}: if the images were moved, add {PREFIX}{key}=FOLDER"
