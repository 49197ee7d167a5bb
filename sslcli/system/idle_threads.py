"""OpenMP setting that makes idle threads sleep early, which frees their cores for data workers."""

from __future__ import annotations

import os

# Spin count of an idle thread before it sleeps: about fifty microseconds. GNU OpenMP's default is 300,000, which takes
# milliseconds. With 1,000 or 0, threads sleep and wake up around operations on small tensors, such as Winograd's.
SPINS = {"GOMP_SPINCOUNT": "5000"}
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def sleep_soon() -> None:
    """Set the spin count of GNU OpenMP unless the user has set it; effective only before torch is imported.

    On two cores with two data workers, spinning threads of the training process took a third of the workers' time, see
    docs/performance.md.
    """
    if not any(name in os.environ for name in _CHOICES):
        os.environ.update(SPINS)
