"""Keys that an older version did not have: a configuration that lacks a key means the default of the class.

If a new version adds a parameter to a class, the default in the constructor keeps the behavior of older versions, and
the yaml file may set another value for new runs. The stored configuration of an older run lacks the key. The run must
resume with the default of the constructor, and not with the value of the yaml file. `sslcli.config.added` describes the
keys of datasets for which this rule does not hold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from sslcli.config.settings import MonitorSettings, TrainSettings
from sslcli.config.signatures import literal_defaults

SECTIONS = {"monitor": MonitorSettings, "train": TrainSettings}  # sections without `_target_`
OTHERS = ("dataset",)  # sections with rules of their own, see `sslcli.config.added`


@cache
def section_defaults(section: str) -> dict[str, Any]:
    """Return the default of each key of a section without `_target_` that has one."""
    kind = SECTIONS.get(section)
    return {} if kind is None else {f.name: f.default for f in fields(kind) if f.default is not MISSING}


def default_of(key: str, flat: Mapping[str, Any]) -> Any:
    """Return the default of a dotted key, or MISSING if it is unknown.

    `flat` is the configuration as dotted key -> value. It contains the `_target_` of the class.
    """
    parent, _, name = key.rpartition(".")
    if parent.partition(".")[0] in OTHERS:
        return MISSING
    target = flat.get(f"{parent}._target_")
    return (literal_defaults(target) if isinstance(target, str) else section_defaults(parent)).get(name, MISSING)


def resumed_config(
    values: dict[str, Any], stored: Mapping[str, Any], set_keys: Collection[str], *, prefix: str = ""
) -> dict[str, Any]:
    """Return the configuration `values` in which keys that `stored` lacks have the default of their class.

    Keys that the command line sets, and keys without a known default, keep their values. Only sections that have the
    same class in both configurations are changed.

    Args:
        values: the composed configuration.
        stored: the configuration with which the run was started.
        set_keys: the dotted keys that the command line sets, such as `method.temperature`.
        prefix: the dotted key of `values` with a trailing dot, or "" for the whole configuration.
    """
    section = prefix.rstrip(".")
    target = values.get("_target_")
    known = literal_defaults(target) if isinstance(target, str) else section_defaults(section)
    found = dict(values)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in stored:
            is_fixed = key in set_keys or target != stored.get("_target_")
            found[name] = value if is_fixed else known.get(name, value)
        elif isinstance(value, dict) and isinstance(stored[name], Mapping) and key not in OTHERS:
            found[name] = resumed_config(value, stored[name], set_keys, prefix=f"{key}.")
    return found
