"""Conversion of the names of parameters and buffers in checkpoints and exports of version 0.1 to current names."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

# Current part of a dotted name -> older names of this part.
OLDER = {
    "momentum_backbone": ("key_backbone", "target_backbone"),
    "momentum_head": ("key_head",),
    "momentum_projector": ("target_projector",),
    "kl_fraction": ("kl_share",),
}


def older_names(name: str) -> Iterator[str]:
    """Yield the names that a parameter or buffer may have in older versions."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        for older in OLDER.get(part, ()):
            yield ".".join([*parts[:place], older, *parts[place + 1 :]])


def current_names(name: str) -> Iterator[str]:
    """Yield the current names that a parameter or buffer with an older name may have."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        for new, olds in OLDER.items():
            if part in olds:
                yield ".".join([*parts[:place], new, *parts[place + 1 :]])


def with_current_names(state: dict[str, Any], wanted: Collection[str]) -> dict[str, Any]:
    """Return a state dict in which older names of the entries in `wanted` are replaced by the current names.

    `wanted` has the names in the state dict of a module. An entry whose name is in `wanted` keeps its name, so a module
    of another package that uses one of the older names can still be loaded.
    """
    current = {
        older: name for name in wanted if name not in state for older in older_names(name) if older not in wanted
    }
    return {current.get(name, name): value for name, value in state.items()}
