"""Conversion of parameter and buffer names of version 0.1 to current names, for checkpoints and exports."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

# Part of a current dotted name -> older names of this part.
OLDER = {
    "momentum_backbone": ("key_backbone", "target_backbone"),
    "momentum_head": ("key_head",),
    "momentum_projector": ("target_projector",),
    "kl_fraction": ("kl_share",),
}


def older_names(name: str) -> Iterator[str]:
    """Yield possible older names of the parameter or buffer whose current name is `name`."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        for older in OLDER.get(part, ()):
            yield ".".join([*parts[:place], older, *parts[place + 1 :]])


def current_names(name: str) -> Iterator[str]:
    """Yield possible current names of the parameter or buffer whose older name is `name`."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        for new, olds in OLDER.items():
            if part in olds:
                yield ".".join([*parts[:place], new, *parts[place + 1 :]])


def with_current_names(state: dict[str, Any], wanted: Collection[str]) -> dict[str, Any]:
    """Return a copy of the state dict `state` in which older names are replaced by current names.

    `wanted` holds the names that a module expects. An older name is replaced only if its current name is in `wanted`. A
    name of `state` that is itself in `wanted` is not replaced. Modules of other packages may therefore use a name that
    is an older name in sslcli.
    """
    current = {
        older: name for name in wanted if name not in state for older in older_names(name) if older not in wanted
    }
    return {current.get(name, name): value for name, value in state.items()}
