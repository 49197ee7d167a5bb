"""Loading of the compiled C files.

Each C file `NAME.c` is next to the Python module that calls its functions. During installation, setup.py compiles the C
file to the library `_NAME.PLATFORM.sharedlib` if there is a C compiler with OpenMP. If there is no library, sslcli uses
torch operations instead.
"""

from __future__ import annotations

import ctypes
import sysconfig
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

CAPABLE = ("AVX2", "AVX512")  # CPU capabilities that include AVX2; setup.py compiles the libraries for AVX2
PARTS = [Path(__file__).parent / name for name in ("winograd_passes.c", "resize.c", "color.c")]
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


def file_of(part: Path) -> Path:
    """Return the path of the library that setup.py compiles from the C file `part`."""
    return part.with_name(f"_{part.stem}.{sysconfig.get_platform()}.sharedlib")


def older_file_of(part: Path) -> Path:
    """Return the path of the library that setup.py of version 0.2 compiled from the C file `part`.

    The library has the name of a Python extension module. After `git pull`, an editable installation still has such
    libraries until sslcli is installed again.
    """
    return part.with_name(f"_{part.stem}{sysconfig.get_config_var('EXT_SUFFIX')}")


@cache
def present() -> list[str]:
    """Return the names of the C files whose compiled libraries can be used.

    Such a library is installed, matches its C file, and is supported by this CPU.
    """
    return [part.stem for part in PARTS if load(part, {}) is not None]


def load(part: Path, functions: Mapping[str, Sequence[Any]]) -> ctypes.CDLL | None:
    """Load the library compiled from the C file `part`, and declare its functions.

    `functions` maps the name of each C function to the types of its arguments. Returns None if the library is not
    available. If the C file was changed after compilation (e.g. by `git pull`), `load` also returns None, with a
    warning, because the functions of the library may have other arguments than those in `functions`.
    """
    if torch.backends.cpu.get_cpu_capability() not in CAPABLE:
        return None
    found = None
    for file in (file_of(part), older_file_of(part)):
        with suppress(OSError):
            found = found or ctypes.CDLL(str(file))
    if found is None:
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
