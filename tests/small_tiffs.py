"""Uncompressed TIFFs with any number of bands, written without a package."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

needs_tifffile = pytest.mark.skipif(importlib.util.find_spec("tifffile") is None, reason="tifffile is not installed")
MINISBLACK, RGB, PALETTE = 1, 2, 3
UNSPECIFIED, ALPHA = 0, 2
_FORMATS = {"u": 1, "i": 2, "f": 3}
_CODES = {2: "s", 3: "H", 4: "I"}


def save_tiff(
    path: Path,
    values: NDArray[Any],
    *,
    planar: bool = False,
    photometric: int = MINISBLACK,
    extra: tuple[int, ...] | None = None,
    nodata: str | None = None,
) -> Path:
    """Write (H, W, B) values. `extra` are the kinds of the bands that are no colors; None = all are unspecified."""
    height, width, count = values.shape
    little = values.astype(values.dtype.newbyteorder("<"))
    strips = [little[:, :, band].tobytes() for band in range(count)] if planar else [little.tobytes()]
    if extra is None:
        extra = (UNSPECIFIED,) * (count - (3 if photometric == RGB else 1))
    tags: dict[int, tuple[int, tuple[int, ...] | bytes]] = {
        256: (4, (width,)),
        257: (4, (height,)),
        258: (3, (8 * values.itemsize,) * count),
        259: (3, (1,)),
        262: (3, (photometric,)),
        273: (4, (0,) * len(strips)),
        277: (3, (count,)),
        278: (4, (height,)),
        279: (4, tuple(map(len, strips))),
        284: (3, (2 if planar else 1,)),
        339: (3, (_FORMATS[values.dtype.kind],) * count),
    }
    if extra:
        tags[338] = (3, extra)
    if nodata is not None:
        tags[42113] = (2, nodata.encode() + b"\0")
    # The offsets of the strips depend on the size of the tags, which does not depend on the offsets.
    start = len(_directory(tags))
    tags[273] = (4, tuple(start + sum(map(len, strips[:number])) for number in range(len(strips))))
    path.write_bytes(_directory(tags) + b"".join(strips))
    return path


def _directory(tags: dict[int, tuple[int, tuple[int, ...] | bytes]]) -> bytes:
    """The header and the only directory of a TIFF, with all values that do not fit into it."""
    entries, after = b"", b""
    offset = 8 + 2 + 12 * len(tags) + 4
    for tag, (kind, value) in sorted(tags.items()):
        data = value if isinstance(value, bytes) else struct.pack(f"<{len(value)}{_CODES[kind]}", *value)
        if len(data) <= 4:
            place = data.ljust(4, b"\0")
        else:
            place = struct.pack("<I", offset + len(after))
            after += data + b"\0" * (len(data) % 2)
        entries += struct.pack("<HHI", tag, kind, len(value)) + place
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + after
