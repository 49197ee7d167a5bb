"""Available memory, and settings of glibc's malloc with which training steps cause no page faults."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from sslcli.system import cgroup

# (option number in glibc's malloc.h, value). malloc then allocates all blocks on the heap and never trims the heap.
_OPTIONS = (
    (-4, 0),  # M_MMAP_MAX: maximum number of blocks allocated with mmap
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: the heap is trimmed if more bytes at its top are free
    (-2, 1 << 26),  # M_TOP_PAD: extra bytes requested whenever the heap grows
)
# The same options with glibc's defaults.
_DEFAULTS = ((-4, 1 << 16), (-1, 1 << 17), (-2, 1 << 17))


def keep_freed_memory() -> bool:
    """Configure malloc to keep freed memory. Return True if malloc accepts all options, as glibc on Linux does.

    All training steps free and allocate blocks of the same sizes. With these options, each step reuses the memory of
    the previous step. After the first steps, no page faults occur. The memory usage of the process stays at its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in _OPTIONS)


def release_freed_memory() -> None:
    """Undo `keep_freed_memory`: restore the defaults of glibc's malloc, and return freed memory to the system."""
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None and all(mallopt(option, value) == 1 for option, value in _DEFAULTS):
        getattr(libc, "malloc_trim", lambda padding: None)(0)


def available_memory() -> int:
    """Return the available memory in bytes: of this machine, or of the control group of this process if it has less.

    On systems without /proc/meminfo, the result is sys.maxsize.
    """
    limits = [found for found in (cgroup.free_memory(),) if found is not None]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min(limits, default=sys.maxsize)
