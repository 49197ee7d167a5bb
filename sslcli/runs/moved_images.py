"""Resuming of runs whose images were moved. Another path of the dataset is accepted if the images are the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sslcli.config.comparison import moved_paths
from sslcli.config.own_dataset import FINGERPRINT
from sslcli.data.sources.base import Source
from sslcli.distributed import collectives
from sslcli.errors import ConfigError
from sslcli.report.console import Screen

MOVED = "moved paths"  # key in the section `effective` of config.yaml; only runs whose images were moved have it


def possibly_moved(stored: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """Return the dataset settings, such as `root`, whose paths have changed since the run was started.

    If the run stored no fingerprint of its images, the images at the old and the new path cannot be compared (see
    `check_moved`), and the result is ().

    stored: content of `config.yaml`, or {} for a new run.
    now: settings of this start.
    """
    known = (stored.get("effective") or {}).get(FINGERPRINT)
    return tuple(moved_paths(stored, now)) if known else ()


def earlier_moved(stored: dict[str, Any]) -> tuple[str, ...]:
    """Return the dataset settings whose paths changed at an earlier start of the run.

    Checkpoints that are older than that start contain the old paths. `stored` is the content of `config.yaml`, or {}
    for a new run.
    """
    keys = (stored.get("effective") or {}).get(MOVED)
    return tuple(key for key in keys if isinstance(key, str)) if isinstance(keys, list) else ()


def check_moved(run_dir: Path, stored: dict[str, Any], now: dict[str, Any], source: Source, screen: Screen) -> None:
    """Raise ConfigError on all processes if paths of the dataset changed and the images are not the same.

    The sizes, the labels and the names relative to the root are compared. The function `check_images`, which is called
    later, compares modification times or contents. This is a collective operation: all processes must call it.

    Args:
        run_dir: the run directory, for the message.
        stored: content of `config.yaml`, or {} for a new run.
        now: settings of this start.
        source: the current images.
        screen: the progress display.
    """
    answer = [""]
    if collectives.is_main():
        keys = possibly_moved(stored, now)
        pairs = moved_paths(stored, now) if keys else {}
        changes = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in pairs.items())
        if keys and source.fingerprint != stored["effective"][FINGERPRINT]:
            answer = [
                f"{changes}, but these are not the images with which the run in {run_dir} was started: names, sizes or "
                "labels differ. Use the images of the run to resume, or another run_dir to start a new run"
            ]
        elif keys:
            screen.say(f"the images were moved: {changes}")
    collectives.broadcast_objects(answer)
    if answer[0]:
        raise ConfigError(answer[0])


def moved_row(keys: Iterable[str]) -> dict[str, Any]:
    """Return the entry of the section `effective` of config.yaml that lists the dataset settings whose paths changed.

    `keys` are the names of these settings. If there are none, return {}.
    """
    found = sorted(set(keys))
    return {MOVED: found} if found else {}
