"""Loading of the trained weights of a run from one of its checkpoints, and their provenance."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sslcli.engine import checkpoint
from sslcli.engine.checkpoint_check import NOT_OF_THE_NETWORK, check_configuration
from sslcli.errors import ConfigError
from sslcli.runs import directory

ATTEMPTS = 20  # a run that saves at every step may delete several checkpoints before this process has opened one
SECONDS_BETWEEN_ATTEMPTS = 0.02


def load_checkpoint(run_dir: Path, which: str | int, saved: dict[str, Any]) -> checkpoint.Loaded:
    """Load the weights of the checkpoint `which`, see `find_checkpoint`. `saved` is the configuration of the run.

    A run that is still training may delete the checkpoint while this function opens it. In this case, the search for
    the checkpoint `which` is repeated. Raises ConfigError if the checkpoint does not exist, is invalid, or belongs to a
    run with another configuration.
    """
    for left in reversed(range(ATTEMPTS)):
        path = None
        try:
            path = find_checkpoint(run_dir, which)
            loaded = checkpoint.load_weights_of(path)
        except ConfigError:
            is_replaced = directory.is_locked(run_dir) if path is None else not path.exists()
            if not left or not is_replaced:
                raise
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
            continue
        check_configuration(path, loaded.config, saved, may_differ=NOT_OF_THE_NETWORK)
        return loaded
    raise AssertionError("the last attempt returns or raises")


def find_checkpoint(run_dir: Path, which: str | int) -> Path:
    """Return the checkpoint of step `which`, or the newest checkpoint if `which` is "last".

    Raises ConfigError if the checkpoint does not exist. The message lists the existing steps.
    """
    paths = checkpoint.all_of(run_dir)
    found = [path for path in paths if which in ("last", checkpoint.step_of(path))]
    if not found:
        kept = ", ".join(str(checkpoint.step_of(path)) for path in paths) or "none"
        raise ConfigError(f"checkpoint is {which!r}, but {run_dir} has checkpoints of the steps: {kept}")
    return found[-1]


def provenance_of(saved: dict[str, Any], run_dir: Path, loaded: checkpoint.Loaded) -> dict[str, Any]:
    """Return the entries of the result file that state where the weights in a checkpoint come from.

    Examples are the run directory, the hash of the checkpoint file, and the class of the method.

    `saved` is the configuration of the run, and `loaded` is the checkpoint.
    """
    return {
        "run": str(run_dir.absolute()),
        "checkpoint": loaded.path.name,
        "checkpoint_sha256": loaded.digest,
        "step": loaded.step,
        "method": saved["method"]["_target_"],
        "backbone": saved["backbone"]["_target_"],
        "pretrained_on": type_name(saved["dataset"]),
        "pretraining_seed": saved["seed"],
    }


def type_name(node: dict[str, Any]) -> str:
    """Return the name of a dataset without building the dataset. `node` contains the settings of the dataset.

    The name is the setting `name` if `node` has this setting, else the name of the class in lower case.
    """
    return str(node.get("name") or node["_target_"].rpartition(".")[2].lower())
