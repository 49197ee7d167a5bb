"""Defaults for keys that the stored configuration of an older run lacks.

If a new version adds a parameter to a class, the default in the constructor keeps the behavior of older versions. The
yaml file may set another value for new runs. If an older run is resumed, its stored configuration lacks the new key.
The key then gets the default of the constructor, and not the value of the yaml file. Keys of the section `dataset`
follow other rules, see `sslcli.config.added`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from sslcli.config.settings import AUTO_KEYS, NEUTRAL, MonitorSettings, RunSettings, TrainSettings
from sslcli.config.signatures import literal_defaults

SECTIONS = {"": RunSettings, "monitor": MonitorSettings, "train": TrainSettings}  # sections without `_target_`
OTHERS = ("dataset",)  # sections with rules of their own, see `sslcli.config.added`


@cache
def section_defaults(section: str) -> dict[str, Any]:
    """Return the defaults of the keys of `train` or `monitor`, or of the top-level keys (""), as key -> default.

    These sections have no `_target_`. Keys without a default, and keys that do not affect results, are omitted. For
    any other section, the result is empty.
    """
    kind = SECTIONS.get(section)
    return (
        {}
        if kind is None
        else {f.name: f.default for f in fields(kind) if f.default is not MISSING and f.name not in NEUTRAL}
    )


def default_of(key: str, flat: Mapping[str, Any]) -> Any:
    """Return the default of a dotted key such as `method.temperature`, or MISSING if no default is known.

    The default is that in the constructor of a class. For `method.temperature`, `method._target_` names this class.
    For keys of `train` and `monitor`, and for top-level keys, the default is that in the class of the settings. For all
    keys of `dataset`, the result is MISSING. `flat` is the whole configuration as dotted key -> value.
    """
    parent, _, name = key.rpartition(".")
    if parent.partition(".")[0] in OTHERS:
        return MISSING
    return _defaults_of(parent, flat.get(f"{parent}._target_")).get(name, MISSING)


def _defaults_of(section: str, target: object) -> dict[str, Any]:
    """Return the defaults of the class `target` (a dotted name), or of a section that has no class."""
    return literal_defaults(target) if isinstance(target, str) else section_defaults(section)


def resumed_config(
    values: dict[str, Any], stored: Mapping[str, Any], set_keys: Collection[str], *, prefix: str = ""
) -> dict[str, Any]:
    """Return the configuration with which an older run resumes.

    If `stored` lacks a key of `values`, the key gets the default in the constructor of its class. Keys that the command
    line sets, and keys without a known default, keep their values. A section is changed only if it has the same class
    in both configurations. A key in `AUTO_KEYS` that the command line does not set keeps the stored value.

    Args:
        values: the composed configuration.
        stored: the configuration with which the run was started.
        set_keys: the dotted keys that the command line sets, such as `method.temperature`.
        prefix: the dotted key of `values` with a trailing dot, or "" for the whole configuration.
    """
    target = values.get("_target_")
    found = dict(values)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in stored:
            if key not in set_keys and target == stored.get("_target_"):
                found[name] = _defaults_of(prefix.rstrip("."), target).get(name, value)
        elif key in AUTO_KEYS and key not in set_keys:
            found[name] = stored[name]
        elif isinstance(value, dict) and isinstance(stored[name], Mapping) and key not in OTHERS:
            found[name] = resumed_config(value, stored[name], set_keys, prefix=f"{key}.")
    return found
