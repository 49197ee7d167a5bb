"""CPU cores available to this process, and the time for which its idle OpenMP threads spin."""

from __future__ import annotations

import os

# Number of times that an idle thread spins before it sleeps: takes about fifty microseconds. GNU OpenMP's default,
# 300,000, takes milliseconds. With 1,000 or 0, threads sleep and wake up between operations on small tensors, such as
# those of Winograd convolutions.
SPINS = {"GOMP_SPINCOUNT": "5000"}
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def usable() -> list[int]:
    """Return the numbers of the cores that this process may use (its affinity); all cores on systems such as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores_per_process() -> int:
    """Return the number of cores per process: usable cores / LOCAL_WORLD_SIZE (set by launchers), at least 1."""
    return max(1, len(usable()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def limit_spinning() -> None:
    """Set the spin count of GNU OpenMP unless the user has set it; effective only before torch is imported.

    Spinning threads slow down other processes: on two cores with two data workers, they took a third of the workers'
    time, see docs/performance.md.
    """
    if not any(name in os.environ for name in _CHOICES):
        os.environ.update(SPINS)
