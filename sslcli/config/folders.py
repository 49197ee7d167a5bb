"""Folders of yaml files: the folder of sslcli, and the user's folder from `--config-dir`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def user_folders(arguments: list[str]) -> list[Path]:
    """Return a list with the folder given by --config-dir, or an empty list."""
    for position, part in enumerate(arguments):
        flag, _, value = part.partition("=")
        if flag in ("--config-dir", "-cd"):
            return [Path(value or "".join(arguments[position + 1 : position + 2]))]
    return []


def conf_folder(*, installed: bool = False) -> Path | None:
    """Return the folder of the yaml files. If sslcli is not installed, this is the folder `conf` of the checkout.

    With installed=True, return None if the package is not installed.
    """
    spec = find_spec("sslcli.conf")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    return None if installed else Path(__file__).resolve().parents[2] / "conf"
