"""Folders of yaml files: the folder of sslcli, and the folder that the user passes with `--config-dir`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def user_folders(arguments: list[str]) -> list[Path]:
    """Return a list with the folder that `--config-dir` or `-cd` names, or an empty list.

    `arguments` are the arguments of the command line.
    """
    for position, part in enumerate(arguments):
        flag, _, value = part.partition("=")
        if flag in ("--config-dir", "-cd"):
            return [Path(value or "".join(arguments[position + 1 : position + 2]))]
    return []


def conf_folder(*, installed: bool = False) -> Path | None:
    """Return the folder of sslcli's yaml files.

    If sslcli is installed, this is the folder of the package `sslcli.conf`. Otherwise, it is the folder `conf` of the
    checkout. If sslcli is not installed and `installed` is True, return None.
    """
    spec = find_spec("sslcli.conf")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    return None if installed else Path(__file__).resolve().parents[2] / "conf"
