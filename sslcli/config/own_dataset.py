"""The image set that a run was trained on, with the changes of an `ssl-eval dataset.KEY=value` command line."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslcli.config import schema
from sslcli.config.keys import check_path
from sslcli.config.paths import absolute, in_nodes, paths_of, same_paths, without_paths
from sslcli.config.targets import check_target, targets
from sslcli.errors import ConfigError

PREFIX = "dataset."
FINGERPRINT = "image fingerprint"  # the key of `effective` in a run's configuration
# Keys that change how images are read and not which images a set has.
READING = (
    "workers",
    "max_bad",
    "verify",
    "scaled_decode",
    "keep_decoded",
    "keep_gb",
    "keep_dir",
    "download",
    "memory_gb",
)


class Change(NamedTuple):
    """One `dataset.KEY=value` of a command line, as plain values."""

    sign: str  # "", "+" (add), "++" (set or add) or "~" (delete)
    key: str  # behind `dataset.`
    value: Any


def dataset_of_run(saved: dict[str, Any], changes: list[Change], *, trust: list[str]) -> dict[str, Any]:
    """The node `dataset` of a run's configuration with `changes` applied and checked; paths are absolute.

    Raises ConfigError for a key that the image set does not have and for a value that it cannot take.
    """
    node = OmegaConf.create({"dataset": saved["dataset"]})
    for change in map(Change._make, changes):
        path = PREFIX + change.key
        if change.sign == "~":
            _delete(node, change.key)
            continue
        if change.sign == "":
            check_path("eval", path, node, signed=True)
        try:
            OmegaConf.update(node, path, change.value, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path} cannot be set to {change.value!r}: {str(error).splitlines()[0]}") from error
    plain = OmegaConf.to_container(node, resolve=False)
    assert isinstance(plain, dict)
    if changes:
        for where, target in targets("", plain):
            check_target(target, trust, where)
        schema.check_group("dataset", plain["dataset"])
    found: dict[str, Any] = in_nodes(plain["dataset"], absolute)
    return found


def _delete(node: Any, key: str) -> None:
    """Remove a key inside one of the values of the image set."""
    where, _, name = key.rpartition(".")
    inside = OmegaConf.select(node, PREFIX + where) if where else None
    if not isinstance(inside, DictConfig):
        raise ConfigError(f"~{PREFIX}{key}: a setting cannot be deleted: give a value")
    if name not in inside:
        raise ConfigError(schema.unknown(PREFIX + where, name, map(str, inside)))
    del inside[name]


def has_same_keys(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two image sets are alike in all but where their files are and how these are read."""
    return bool(without_paths(images_of(one)) == without_paths(images_of(other)))


def is_same_place(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two image sets are alike and their files are in the same place."""
    return same_paths(images_of(one), images_of(other))


def images_of(node: dict[str, Any]) -> dict[str, Any]:
    """What decides which images a set has, and not how they are read."""
    return {key: value for key, value in node.items() if key not in READING}


def where_to_look(node: dict[str, Any]) -> str:
    """A sentence on paths of an image set that lead nowhere; empty if all of them exist."""
    absent = [(key, path) for key, path in paths_of(node) if os.path.isabs(path) and not os.path.exists(path)]
    if not absent:
        return ""
    key, path = absent[0]
    return f". The run names {path} as {PREFIX}{key}: if its images are elsewhere, add {PREFIX}{key}=FOLDER"
