"""Parts that are compiled where there is a C compiler with OpenMP; elsewhere torch does their work.

A part is a C file `NAME.c` beside the module that calls it; setup.py makes the library `_NAME` of it.
"""

from __future__ import annotations

import ctypes
import sysconfig
import warnings
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

CAPABLE = ("AVX2", "AVX512")  # what setup.py lets the compiler use
PARTS = [Path(__file__).parent / name for name in ("winograd_passes.c", "data/resize.c", "data/change.c")]
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


def file_of(part: Path) -> Path:
    """Where the library of a C file is."""
    return part.with_name(f"_{part.stem}{sysconfig.get_config_var('EXT_SUFFIX')}")


@cache
def present() -> list[str]:
    """The names of the parts that this installation has and this processor can run."""
    return [part.stem for part in PARTS if load(part, {}) is not None]


def load(part: Path, functions: Mapping[str, Sequence[Any]]) -> ctypes.CDLL | None:
    """The library of a C file, with the types of the arguments of its functions; None where it is not to be had.

    Nor is that of a checkout whose C file was changed since, by `git pull` for one: calls may have changed too.
    """
    if torch.backends.cpu.get_cpu_capability() not in CAPABLE:
        return None
    try:
        found = ctypes.CDLL(str(file_of(part)))
    except OSError:
        return None
    if part.exists() and ctypes.c_uint32.in_dll(found, "source_checksum").value != zlib.crc32(part.read_bytes()):
        warnings.warn(
            f"{part.name} was changed since it was compiled: install sslcli again for its speed", stacklevel=2
        )
        return None
    for name, arguments in functions.items():
        function = getattr(found, name)
        function.argtypes, function.restype = list(arguments), None
    return found
