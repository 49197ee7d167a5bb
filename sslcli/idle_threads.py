"""Threads of a run that have nothing to do sleep soon, since a data worker may need their core."""

from __future__ import annotations

import os

# Looks for the next piece of work before a thread sleeps: some fifty microseconds. GNU's OpenMP looks 300,000 times, or
# milliseconds. With 1,000 or none, threads sleep and wake around operations on small tensors, such as Winograd's.
SPINS = {"GOMP_SPINCOUNT": "5000"}
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def sleep_soon() -> None:
    """Set the environment of GNU's OpenMP, unless the user has chosen; of use only before torch is imported.

    On two cores with two data workers the threads of the training process took a third of the time from the workers by
    waiting, see docs/performance.md.
    """
    if not any(name in os.environ for name in _CHOICES):
        os.environ.update(SPINS)
