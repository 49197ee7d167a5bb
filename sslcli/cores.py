"""The processor cores that this process may use."""

from __future__ import annotations

import os


def usable() -> list[int]:
    """Their numbers: those it was bound to; all of the machine where the system binds no processes, as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def share() -> int:
    """How many of them fall to each process of a run, which outer launchers count in LOCAL_WORLD_SIZE; at least 1."""
    return max(1, len(usable()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
