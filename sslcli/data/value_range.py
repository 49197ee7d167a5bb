"""Mapping of pixel values to 8 bits (`dataset.value_range`): 16-bit and 32-bit integers, and floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ValueRange = str | tuple[float, float]  # "auto", "full", or the values that are mapped to 0 and 255

MODES = ("auto", "full")
BIT_DEPTHS = (8, 10, 12, 14, 16)  # bit depths of cameras and scanners, whose values are stored with 16 bits
PERCENTILES = (0.1, 99.9)  # "auto" maps these percentiles to 0 and 255, see _automatic_range
NODATA_MAGNITUDE = 1e30  # floats of a larger magnitude mark missing pixels, such as -3.4e38, the lowest 32-bit float
_MAX_PERCENTILE_VALUES = 2**20  # number of values from which the percentiles are computed, roughly


def parse_value_range(value: str | Sequence[float]) -> ValueRange:
    """Return the value of `dataset.value_range`. Raises ValueError if it is not valid."""
    if isinstance(value, str) and value in MODES:
        return value
    if not isinstance(value, str) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]:
        return float(value[0]), float(value[1])
    given = value if isinstance(value, str) else list(value)
    raise ValueError(
        f"dataset.value_range is {given!r}, but it must be auto, full, or two numbers, the lower one first, such as "
        "[0,4095]"
    )


def to_8_bits(values: NDArray[Any], value_range: ValueRange, *, nodata: float | None = None) -> NDArray[np.uint8]:
    """Map pixel values to 0 to 255. See docs/data.md for the rules.

    Args:
        values: (H, W, B) integers, floats or booleans. All bands are mapped in the same way.
        value_range: "auto", "full", or the two values that are mapped to 0 and 255. Values outside of the range between
            these two values are clipped.
        nodata: the value of missing pixels, or None. Pixels are also missing if they are NaN, or if their magnitude is
            at least `NODATA_MAGNITUDE`. Missing pixels become 0 and do not affect the range. With "full", no pixels
            count as missing.

    Returns:
        (H, W, B). With "auto" and "full", values of 8 bits are not changed.
    """
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    if value_range == "full":
        return _full_range(values)
    if values.dtype == np.uint8 and value_range == "auto":
        return values
    missing = _missing(values, nodata)
    if missing is not None and missing.all():
        return np.zeros(values.shape, np.uint8)
    if isinstance(value_range, tuple):
        low, high = value_range
    else:
        low, high = _automatic_range(values if missing is None else values[~missing])
    mapped = _mapped(values, low, high)
    if missing is not None:
        mapped[missing] = 0
    return mapped


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _full_range(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Map a fixed range to 0 to 255: the range [0, 1] for floats, and 0 to 65535 for integers.

    Values of 8 bits are not changed. If any value is outside of the fixed range, the minimum of the values is mapped to
    0 and their maximum to 255.
    """
    if values.dtype == np.uint8:
        return values
    finite = np.nan_to_num(np.asarray(values, np.float64))
    low, high = 0.0, 1.0 if np.issubdtype(values.dtype, np.floating) else 65535.0
    if finite.min() < low or finite.max() > high:
        low, high = float(finite.min()), float(finite.max())
    scaled = (finite - low) / max(high - low, np.finfo(float).tiny) * 255
    return np.rint(scaled).astype(np.uint8)


def _missing(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_] | None:
    """Return the mask of the missing pixels. Return None if no pixel is missing.

    A pixel is missing if its value is `nodata` or NaN, or if the magnitude of a float is at least `NODATA_MAGNITUDE`.
    """
    found = None
    if nodata is not None and not math.isnan(nodata):
        with np.errstate(over="ignore"):
            found = values == np.float64(nodata).astype(values.dtype if values.dtype.kind == "f" else np.float64)
    if values.dtype.kind == "f":
        invalid = ~(np.abs(values) < NODATA_MAGNITUDE)  # also True for NaN
        found = invalid if found is None else found | invalid
    return found if found is not None and found.any() else None


def _automatic_range(valid: NDArray[Any]) -> tuple[float, float]:
    """Return the two values that "auto" maps to 0 and 255.

    - If all values are integers from 0 to 65535: 0 and 2**b - 1, where b is the smallest bit depth in `BIT_DEPTHS` that
      can represent all values.
    - Otherwise: the percentiles `PERCENTILES` of the values. If both percentiles are equal: the minimum and maximum.

    valid: the pixel values that are not missing.
    """
    least, most = float(valid.min()), float(valid.max())
    if valid.dtype.kind in "iu" and least >= 0 and most < 2 ** BIT_DEPTHS[-1]:
        return 0.0, float(next(2**depth - 1 for depth in BIT_DEPTHS if most < 2**depth))
    flat = valid.reshape(-1)
    low, high = np.percentile(flat[:: max(1, len(flat) // _MAX_PERCENTILE_VALUES)].astype(np.float64), PERCENTILES)
    return (float(low), float(high)) if low < high else (least, most)


def _mapped(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Map [low, high] linearly to 0 to 255, with clipping. If low equals high, all results are 0."""
    if values.dtype in (np.uint8, np.uint16):
        table = _mapped(np.arange(np.iinfo(values.dtype).max + 1), low, high)
        return np.asarray(table[values])
    width = high - low if high > low else 1.0
    work = np.nan_to_num(values.astype(np.float32 if values.dtype == np.float32 else np.float64))
    mapped: NDArray[np.uint8] = np.rint(((work.clip(low, high) - low) / width).clip(0, 1) * 255).astype(np.uint8)
    return mapped
