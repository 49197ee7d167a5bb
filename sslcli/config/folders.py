"""Folders of yaml files: those of sslcli and those of the command line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def own_folders(arguments: list[str]) -> list[Path]:
    """The folder given by --config-dir, if there is one."""
    for place, part in enumerate(arguments):
        flag, _, value = part.partition("=")
        if flag in ("--config-dir", "-cd"):
            return [Path(value or "".join(arguments[place + 1 : place + 2]))]
    return []


def folder_of_conf(*, installed: bool = False) -> Path | None:
    """Where the yaml files are: beside the package once it is installed, in the checkout otherwise."""
    spec = find_spec("sslcli.conf")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    return None if installed else Path(__file__).resolve().parents[2] / "conf"
