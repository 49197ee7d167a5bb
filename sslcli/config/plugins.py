"""Installed plug-in packages.

A plug-in is a package that declares an entry point in the group `sslcli.plugins`. Plug-ins are found without importing
them.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


@lru_cache
def plugins() -> tuple[str, ...]:
    """Return the names of the packages of all installed plug-ins.

    A plug-in is a package that declares an entry point in the group `sslcli.plugins`.
    """
    from importlib.metadata import entry_points

    names = (entry.value.split(":")[0].split(".")[0] for entry in entry_points(group="sslcli.plugins"))
    return tuple(dict.fromkeys(names))


def plugin_folders() -> dict[str, Path]:
    """Return the folders `conf` of the installed plug-ins, as package name -> folder.

    Plug-ins without such a folder are omitted. The subfolders of `conf` are named after the config groups.
    """
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
