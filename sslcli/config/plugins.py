"""Installed plug-in packages. They are found by the entry point `sslcli.plugins` and not imported."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


@lru_cache
def plugins() -> tuple[str, ...]:
    """Return the package names of all plug-ins."""
    from importlib.metadata import entry_points

    names = (entry.value.split(":")[0].split(".")[0] for entry in entry_points(group="sslcli.plugins"))
    return tuple(dict.fromkeys(names))


def plugin_folders() -> dict[str, Path]:
    """Return the folder `conf` of each plug-in that has one. Its subfolders are named after the config groups."""
    found = {}
    for name in plugins():
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            continue
        for folder in (spec and spec.submodule_search_locations) or ():
            if Path(folder, "conf").is_dir():
                found[name] = Path(folder, "conf")
    return found
