"""Installed packages that announce themselves by the entry point `sslcli.plugins`, found without importing them."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


@lru_cache
def plugins() -> tuple[str, ...]:
    """Their names."""
    from importlib.metadata import entry_points

    names = (entry.value.split(":")[0].split(".")[0] for entry in entry_points(group="sslcli.plugins"))
    return tuple(dict.fromkeys(names))


def conf_of_plugins() -> dict[str, Path]:
    """The folder `conf` of every one that has it: yaml files in folders named like the groups."""
    found = {}
    for name in plugins():
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            continue
        for place in (spec and spec.submodule_search_locations) or ():
            if Path(place, "conf").is_dir():
                found[name] = Path(place, "conf")
    return found
