"""Checkpoints of older versions, brought up to date step by step when they are read.

A change of what a checkpoint holds raises SCHEMA by one and adds a function here that makes the new state of the old
one. Files are not rewritten: the next checkpoint of the run is of the newest version.
"""

from __future__ import annotations

from typing import Any

SCHEMA = 2


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of version 1 to SCHEMA as one of SCHEMA; without a version it counts as 1."""
    for version in range(state.get("schema", 1), SCHEMA):
        state = STEPS[version](state) | {"schema": version + 1}
    return state


def add_circumstances(state: dict[str, Any]) -> dict[str, Any]:
    """Version 2 tells under what circumstances the run was going, and from where the loader goes on."""
    return {"loader": None} | state | {"circumstances": {}}  # not known of older ones


STEPS = {1: add_circumstances}  # from each version to the next
