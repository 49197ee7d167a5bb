"""Freed memory is kept for the next step: glibc would give large blocks back to the kernel and fault them in anew."""

from __future__ import annotations

import ctypes
import sys

# The numbers of glibc's malloc.h, and what is set. Blocks are taken from the heap, which is never trimmed.
_OPTIONS = (
    (-4, 0),  # M_MMAP_MAX: blocks with a mapping of their own
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: bytes free at the end of the heap before it shrinks
    (-2, 1 << 26),  # M_TOP_PAD: bytes by which it grows beyond what is asked for
)


def keep_freed_memory() -> bool:
    """Let the C library keep what this process frees; whether it takes the advice (glibc on Linux does).

    A training step frees and asks for the same blocks again, so in steady state no page is faulted in. The process
    stays as large as its largest step was.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in _OPTIONS)
