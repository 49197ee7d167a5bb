"""Conversion of checkpoints of older versions to the current schema, version by version, at load time.

SCHEMA is the version of the content of checkpoints. To change the content, increment SCHEMA and add a function to this
module. The function converts a state of the previous version. Existing files are not rewritten. The next checkpoint of
the run has the newest version. The schema does not cover the names of parameters and buffers, see
`sslcli.weights.renamed`.
"""

from __future__ import annotations

from typing import Any

from sslcli.config.moved import current_config

SCHEMA = 3


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint state to version SCHEMA. A state without a version number has version 1."""
    for version in range(state.get("schema", 1), SCHEMA):
        state = STEPS[version](state) | {"schema": version + 1}
    return state


def add_environment(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint state of version 1 to version 2.

    Version 2 adds the environment of the run and the data loader's position in the epoch.
    """
    return {"loader": None} | state | {"circumstances": {}}  # both are unknown for older checkpoints


def rename_fields(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint state of version 2 to version 3.

    In version 3, fields, settings and compiled kernels have the names of sslcli 0.2.
    """
    state = dict(state)
    state["environment"] = state.pop("circumstances")
    if "compiled parts" in state["environment"]:
        renamed = state["environment"]["compiled parts"].replace("change", "color")
        state["environment"] = state["environment"] | {"compiled parts": renamed}
    if "watch" in state:  # absent if only the weights were loaded
        watch = dict(state.pop("watch"))
        state["monitor"] = watch | {"detector": watch.pop("judge")}
    if "processes" in state:
        state["processes"] = [{"rng": each["rng"], "metric_means": each["window"]} for each in state["processes"]]
    if isinstance(state.get("config"), dict):
        state["config"] = current_config(state["config"])[0]
    return state


STEPS = {1: add_environment, 2: rename_fields}  # version -> function that converts it to the next version
