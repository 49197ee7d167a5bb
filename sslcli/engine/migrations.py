"""Migration of checkpoints of older versions to the current schema, version by version, at load time.

A change of the checkpoint content increments SCHEMA and adds a function here that converts a state of the previous
version. Files are not rewritten: the next checkpoint of the run has the newest version.
"""

from __future__ import annotations

from typing import Any

SCHEMA = 2


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint state of any version up to SCHEMA to version SCHEMA; without a version it is 1."""
    for version in range(state.get("schema", 1), SCHEMA):
        state = STEPS[version](state) | {"schema": version + 1}
    return state


def add_circumstances(state: dict[str, Any]) -> dict[str, Any]:
    """Convert to version 2, which adds the environment of the run and the position of the loader."""
    return {"loader": None} | state | {"circumstances": {}}  # unknown for older checkpoints


STEPS = {1: add_circumstances}  # from each version to the next
