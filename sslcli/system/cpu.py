"""CPU cores available to this process, and the spin time of its idle OpenMP threads."""

from __future__ import annotations

import math
import os

from sslcli.system import cgroup
from sslcli.system.launch_variables import AGENT, local_world_size

# Number of times that an idle thread spins before it sleeps. 5,000 spins take about fifty microseconds. The default of
# GNU OpenMP is 300,000 spins, which take milliseconds. With 1,000 or 0, threads sleep and wake up between operations on
# small tensors (e.g. in Winograd convolutions).
SPINS = {"GOMP_SPINCOUNT": "5000"}
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def usable() -> list[int]:
    """Return the numbers of the cores that this process may use (CPU affinity). On macOS, return all cores."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores_per_process() -> int:
    """Return the number of usable cores divided by the number of processes on this node, at least 1.

    If a control group limits the CPU time of the processes, at most as many cores as this limit are usable. The number
    of processes is the environment variable LOCAL_WORLD_SIZE, which launchers set.
    """
    quota = cgroup.cpu_quota()
    cores = len(usable()) if quota is None else min(len(usable()), math.ceil(quota))
    return max(1, cores // local_world_size())


def requested_threads() -> int | None:
    """Return the number of threads per process that environment variables request, or None if they request none.

    The number is at most the number of usable cores.

    As in torch, MKL_NUM_THREADS takes precedence over OMP_NUM_THREADS, and invalid values are ignored. If the user has
    not set OMP_NUM_THREADS, torchrun sets it to 1. Therefore, the value 1 of OMP_NUM_THREADS is ignored under torchrun.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and AGENT not in os.environ
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        text = (
            os.environ.get(name, "").partition(",")[0].strip()
        )  # OMP_NUM_THREADS may have one value per nesting level
        if not (text.isascii() and text.isdecimal() and int(text)):
            continue
        if name == "OMP_NUM_THREADS" and int(text) == 1 and under_torchrun:
            continue
        return min(int(text), len(usable()))
    return None


def limit_spinning() -> None:
    """Limit how long idle OpenMP threads spin before they sleep. Call this function before torch is imported.

    If the user has set the spin count or the wait policy, nothing is changed. Spinning threads slow down other
    processes. In a test on two cores with two data workers, the spinning threads took a third of the workers' time, see
    docs/performance.md.
    """
    if not any(name in os.environ for name in _CHOICES):
        os.environ.update(SPINS)
