"""Comparison of two configurations of a run: the stored configuration and the configuration of the command line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from typing import Any

from sslcli.config.added import with_added_keys
from sslcli.config.class_defaults import default_of
from sslcli.config.moved import current_config
from sslcli.config.paths import absolute, convert_source, map_paths, paths_of, real_path
from sslcli.config.settings import AUTO_KEYS, NEUTRAL


def flatten(config: dict[str, Any], prefix: str = "", *, leave_out: Collection[str] = NEUTRAL) -> dict[str, Any]:
    """Return the values of a configuration as dotted key -> value.

    The keys in `leave_out` are omitted. If such a key is a section, all keys inside the section are omitted. By
    default, the result contains only values that affect the results of a run. Top-level keys that begin with `_` are
    always omitted. The section `effective` contains values that were computed from the settings, and is also always
    omitted.

    `prefix` is the dotted key of `config` with a trailing dot, or "" for a whole configuration.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if (key.startswith("_") and not prefix) or path in leave_out or path == "effective":
            continue
        if isinstance(value, dict):
            found |= flatten(value, f"{path}.", leave_out=leave_out)
        else:
            found[path] = value
    return found


def changed_settings(stored: dict[str, Any], now: dict[str, Any], *, may_differ: Collection[str] = ()) -> list[str]:
    """Return the differences between two configurations of a run, each as `key: stored value -> current value`.

    An older version may have written `stored`. Therefore, old names of keys and classes in `stored` are first converted
    to current names. `stored` may also lack keys of the dataset that the older version did not have. Each of these keys
    is added with the value that makes this version read the dataset as the older version did. If any other key is
    missing in one configuration, the default of its class is compared instead. Two paths are equal if they refer to the
    same file or folder.

    Args:
        stored: plain values that the run stored earlier.
        now: plain values of the command line.
        may_differ: keys or sections that are not compared, in addition to the keys that do not affect results.
    """
    leave_out = (*NEUTRAL, *may_differ)
    stored = current_config(stored)[0]
    if "dataset" in stored:
        stored["dataset"] = with_added_keys(stored["dataset"], now.get("dataset"))
    before, after = (_compared_values(config, leave_out) for config in (stored, now))
    shown = [flatten(config, leave_out=leave_out) for config in (stored, now)]  # with "auto" and paths as they were set
    return [
        " -> ".join([f"{key}: {shown[0].get(key, 'not set')}", str(shown[1].get(key, "not set"))])
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _is_default_of_other(key, before, after)
    ]


def _compared_values(config: dict[str, Any], leave_out: Collection[str]) -> dict[str, Any]:
    """Return the values of a configuration for a comparison, as dotted key -> value.

    Paths are replaced by real paths. For the keys in `AUTO_KEYS`, "auto" is replaced by the default of older versions.
    """
    found = flatten(map_paths(config, real_path), leave_out=leave_out)
    for key in ("init", "teacher"):
        if isinstance(found.get(key), str):
            found[key] = convert_source(found[key], real_path)
    return found | {key: default_of(key, found) for key in AUTO_KEYS if found.get(key) == "auto"}


def _is_default_of_other(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Return True if only one of two configurations has `key`, and its value is the default value of the key.

    `before` and `after` are the configurations as dotted key -> value. See `default_of` for the default values.
    """
    if key in before and key in after:
        return False
    value = before[key] if key in before else after[key]
    return bool(_plain(default_of(key, before | after)) == _plain(value))


def _plain(value: Any) -> Any:
    """Return a value in which tuples are lists, as in yaml files."""
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def moved_paths(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the paths of the dataset that differ, as dotted key -> (stored path, current path).

    `stored` is the configuration that a run stored, and `now` is the configuration of the command line. A key is
    compared only if its value in both configurations is a single path. Keys and classes in both configurations must
    have the names of this version, not names of version 0.1.
    """
    before, after = stored.get("dataset"), now.get("dataset")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return {}
    first, second = (dict(paths_of(node)) for node in (before, after))
    pairs = {
        f"dataset.{key}": (first[key], second[key])
        for key in sorted(first.keys() & second.keys())
        if isinstance(before[key], str) and isinstance(after[key], str)
    }
    return {key: pair for key, pair in pairs.items() if real_path(pair[0]) != real_path(pair[1])}


def digest_of_settings(config: dict[str, Any]) -> str:
    """Return a digest (16 hex digits) of the values that affect the results of a run.

    If `changed_settings` finds no difference between two configurations, their digests are equal. The key
    `train.extend` is ignored, because it affects only runs that were extended to more epochs. Therefore, do not compare
    digests of extended runs. A key with the default value of its class is omitted. Therefore, the configuration of an
    older version, which lacks the key, has the same digest. Keys and classes in `config` must have the names of this
    version, not names of version 0.1.
    """
    values = _compared_values(config, (*NEUTRAL, "train.extend"))
    known = {
        key: _number(value)
        for key, value in values.items()
        if value is not None and _plain(default_of(key, values)) != value
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _number(value: Any) -> Any:
    """Return `value` with each whole float, such as 1.0, as an int. Equal numbers then have equal JSON.

    `value` is a number, a list that may be nested, or any other value, which is returned unchanged.
    """
    if isinstance(value, list):
        return [_number(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def relative_path_keys(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the dotted keys of the dataset whose values are relative paths.

    Version 0.1 stored relative paths in checkpoints. Such a path has no meaning in another working directory.
    """
    node = config.get("dataset")
    found = paths_of(node) if isinstance(node, dict) else ()
    return tuple(f"dataset.{key}" for key, path in found if not os.path.isabs(path) and absolute(path) != path)
