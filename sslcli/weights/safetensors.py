"""Reader of safetensors files, which needs no further package.

The format: an unsigned 64-bit length, a JSON header of this length, and the values of all tensors. The header maps
each name to a dtype, a shape, and the first and last byte of the values.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sslcli.weights.files import short

LARGEST_HEADER = 100_000_000  # bytes, the limit of the format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_safetensors(file: BinaryIO) -> bool:
    """Return True if an open file begins like a safetensors file. The file is positioned at its start afterwards."""
    start = file.read(9)
    file.seek(0)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= LARGEST_HEADER


def read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """Return all tensors of an open safetensors file by name, on the CPU.

    Raises ValueError if the header is invalid, or if the file is shorter or longer than the header states.
    """
    size = os.fstat(file.fileno()).st_size - 8
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, LARGEST_HEADER):
        raise ValueError(f"its header has {length} bytes, but the file ends before")
    try:
        header = json.loads(file.read(length))
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    header.pop("__metadata__", None)
    values = bytearray(file.read())
    if sum(_extent(name, entry, len(values))[1] for name, entry in header.items()) != len(values):
        raise ValueError(
            f"its tensors do not fill the {len(values)} bytes after the header: it is truncated or damaged"
        )
    return {name: _tensor(name, entry, values) for name, entry in header.items()}


def _tensor(name: str, entry: dict[str, Any], values: bytearray) -> Tensor:
    start, size = _extent(name, entry, len(values))
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    if not size:
        try:
            return torch.empty(shape, dtype=dtype)
        except RuntimeError as error:  # the product of the other sizes overflows
            raise ValueError(f"the header has an invalid shape or position of {short(name)}") from error
    # A copy, because a tensor whose first byte is not aligned to its dtype is slow or invalid.
    return torch.frombuffer(values, dtype=torch.uint8, count=size, offset=start).clone().view(dtype).reshape(shape)


def _extent(name: str, entry: Any, available: int) -> tuple[int, int]:
    """Return the first byte and the number of bytes of a tensor. Raises ValueError if its entry is invalid."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the header has no dtype, shape and data_offsets of {short(name)}") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{short(name)} has the dtype {short(repr(dtype))}, but these are read: {', '.join(DTYPES)}")
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers) or end > available:
        raise ValueError(f"the header has an invalid shape or position of {short(name)}")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{short(name)} has {end - start} bytes, but its shape {short(str(tuple(shape)))} needs another number"
        )
    return start, end - start
