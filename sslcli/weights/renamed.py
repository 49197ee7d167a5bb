"""Names of parameters and buffers in checkpoints and exports of version 0.1, read as today's."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

# Today's part of a dotted name, and the older ones.
OLDER = {
    "momentum_backbone": ("key_backbone", "target_backbone"),
    "momentum_head": ("key_head",),
    "momentum_projector": ("target_projector",),
    "kl_fraction": ("kl_share",),
}


def older_names(name: str) -> Iterator[str]:
    """The names that a parameter or buffer may have had in older versions."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        for older in OLDER.get(part, ()):
            yield ".".join([*parts[:place], older, *parts[place + 1 :]])


def current_names(name: str) -> Iterator[str]:
    """The names of today that a parameter or buffer with an older name may have."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        for new, olds in OLDER.items():
            if part in olds:
                yield ".".join([*parts[:place], new, *parts[place + 1 :]])


def with_current_names(state: dict[str, Any], wanted: Collection[str]) -> dict[str, Any]:
    """Return a state dict in which entries with an older name of a `wanted` entry have that one.

    Only names that `wanted`, the state dict of a module, lacks are changed, so those of other packages are safe.
    """
    current = {
        older: name for name in wanted if name not in state for older in older_names(name) if older not in wanted
    }
    return {current.get(name, name): value for name, value in state.items()}
