"""CPU cores available to this process."""

from __future__ import annotations

import os


def usable() -> list[int]:
    """Return the core numbers in this process's CPU affinity; all cores on systems without affinity, such as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def share() -> int:
    """Return the number of cores per process: usable cores / LOCAL_WORLD_SIZE (set by launchers), at least 1."""
    return max(1, len(usable()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
