"""Checks of the settings that choose a network (`run`, `weights`) and change its dataset, before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sslcli.config.paths import SOURCES_OF_WEIGHTS
from sslcli.errors import ConfigError, nearest


def with_run_of_weights(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with `weights=run:DIR` replaced by `run=DIR`."""
    start, _ = SOURCES_OF_WEIGHTS
    weights = config["weights"]
    if config["run"] is not None or weights is None or not weights.startswith(start):
        return config
    return config | {"run": weights.removeprefix(start), "weights": None}


def check_network(config: dict[str, Any], remedy: str) -> None:
    """Raise ConfigError unless one of `run` and `weights` is set, and is an existing path or a model of timm.

    `remedy` is the message if both or neither are set.
    """
    if (config["run"] is None) == (config["weights"] is None):
        raise ConfigError(remedy)
    _, timm = SOURCES_OF_WEIGHTS
    name = "weights" if config["run"] is None else "run"
    path, prefix = config[name], config["weights_prefix"]
    if name == "run" and prefix is not None:
        raise ConfigError(
            f"weights_prefix is {prefix!r}, but a run states which network is evaluated: remove weights_prefix"
        )
    if not path.startswith(timm) and not os.path.exists(path):
        raise ConfigError(f"{name} is {path!r}, but there is no such path.{_suggestions(path)}")


def check_changes(config: dict[str, Any]) -> None:
    """Raise ConfigError if the command line changes the run's dataset in an invalid way.

    The changes are overrides `dataset.KEY=value`. If the setting `run` is a folder of several runs, the changes are
    checked for each run.
    """
    changes = config["_dataset_changes_"]
    if not changes:
        return
    from sslcli.config.own_dataset import dataset_of_run
    from sslcli.runs.directory import read_config

    run_dir = Path(config["run"])
    if (run_dir / "config.yaml").exists():
        dataset_of_run(read_config(run_dir), changes, trust=config["trust"])
        return
    for found in sorted(run_dir.glob("*/config.yaml")):
        try:
            saved = read_config(found.parent)
        except ConfigError:  # the evaluation reports the error of this run, and evaluates the other runs
            continue
        dataset_of_run(saved, changes, trust=config["trust"])


def _suggestions(path: str) -> str:
    """Return a hint about a path that does not exist: the closest existing name, and the names in its parent folder."""
    folder = os.path.dirname(path.rstrip("/")) or "."
    there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    listed = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
    return f"{nearest(os.path.basename(path), there)} {folder} contains: {listed or 'nothing'}"
