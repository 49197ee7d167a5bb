"""Mapping of 16-bit, 32-bit and float pixels to 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sslcli.data.value_range import parse_value_range, to_8_bits


def mapped(values: Any, value_range: Any = "auto", **options: Any) -> list[int]:
    """The mapping of one row of pixels with one band."""
    found = to_8_bits(np.asarray(values)[None, :, None], value_range, **options)
    assert found.dtype == np.uint8
    return found[0, :, 0].tolist()


@pytest.mark.parametrize("value_range", ["auto", "full"])
def test_eight_bits_are_not_changed(value_range: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    assert np.array_equal(to_8_bits(values, value_range, nodata=3.0), values)
    assert mapped([True, False], value_range) == [255, 0]


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize(
    ("most", "top"), [(0, 255), (255, 255), (256, 1023), (1023, 1023), (1024, 4095), (4095, 4095), (16383, 16383)]
)
def test_integers_are_divided_by_the_bit_depth_that_holds_the_maximum(dtype: Any, most: int, top: int) -> None:
    values = np.unique(np.linspace(0, most, 50).astype(dtype))
    assert mapped(values) == [round(value / top * 255) for value in values.tolist()]


def test_sixteen_bits_above_14_bits_are_divided_by_65535() -> None:
    assert mapped(np.array([0, 257, 16384, 65535], np.uint16)) == [0, 1, 64, 255]


def test_twelve_bits_keep_their_levels() -> None:
    values = np.arange(4096, dtype=np.uint16)
    assert len(set(mapped(values))) == 256
    assert len(set(mapped(values, "full"))) == 17


def test_integers_that_are_negative_or_larger_than_16_bits_use_percentiles() -> None:
    found = mapped(np.linspace(-500, 500, 1001).astype(np.int16))
    assert (found[0], found[499], found[501], found[-1]) == (0, 127, 128, 255)
    assert mapped(np.array([0, 100_001, 200_000], np.uint32)) == [0, 128, 255]


def test_floats_use_percentiles_and_ignore_missing_pixels() -> None:
    ramp = np.linspace(2, 3, 10_001, dtype=np.float32)
    wanted = np.rint(((ramp - 2.001) / 0.998).clip(0, 1) * 255)
    assert np.abs(np.subtract(mapped(ramp), wanted)).max() <= 1
    for missing in (np.nan, np.inf, -np.inf, -3.4e38, np.finfo(np.float32).min):
        assert mapped(np.append(ramp, np.float32(missing))) == [*mapped(ramp), 0]
    assert mapped(np.append(ramp, np.float32(-9999)), nodata=-9999.0) == [*mapped(ramp), 0]
    # Outliers, at most 0.1 % at each end, are clipped.
    assert len(set(mapped(np.append(ramp, np.float32([1e6, -1e6]))))) > 200


def test_one_missing_pixel_leaves_the_gray_levels_of_the_others() -> None:
    values = np.random.default_rng(0).random((40, 40, 1), np.float32)
    values[0] = -3.4e38
    assert len(np.unique(to_8_bits(values, "auto"))) > 200


def test_the_missing_value_is_ignored_in_integers_too() -> None:
    assert mapped(np.array([65535, 0, 4095, 2048], np.uint16), nodata=65535.0) == [0, 0, 255, 128]
    assert mapped(np.array([-32768, 0, 255], np.int16), nodata=-32768.0) == [0, 0, 255]


def test_a_constant_image_and_an_image_without_valid_pixels_are_black() -> None:
    assert mapped(np.full(9, 0.7, np.float32)) == [0] * 9
    assert mapped(np.full(9, np.nan)) == [0] * 9
    assert mapped(np.full(9, np.nan), (0.0, 1.0)) == [0] * 9
    mask = np.zeros(10_000, np.float32)
    mask[7] = 1  # too few ones for a percentile
    assert mapped(mask)[6:9] == [0, 255, 0]


def test_all_bands_are_mapped_together() -> None:
    values = np.zeros((2, 2, 3), np.uint16)
    values[..., 1], values[..., 2] = 1000, 2000
    assert to_8_bits(values, "auto")[0, 0].tolist() == [0, round(1000 / 4095 * 255), round(2000 / 4095 * 255)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_a_range_is_mapped_linearly_and_clipped(dtype: Any) -> None:
    assert mapped(np.array([0, 10, 35, 60, 110, 120], dtype), (10.0, 110.0)) == [0, 0, 64, 128, 255, 255]


def test_a_range_of_floats_ignores_missing_pixels() -> None:
    values = np.array([np.nan, np.inf, -3.4e38, 0.5, -9999.0], np.float32)
    assert mapped(values, (-10_000.0, 1.0), nodata=-9999.0) == [0, 0, 0, 255, 0]


def test_full_is_the_range_of_the_type_and_larger_values_are_stretched() -> None:
    assert mapped(np.array([0, 257, 65535], np.uint16), "full") == [0, 1, 255]
    assert mapped(np.array([0.0, 0.2, 1.0], np.float32), "full") == [0, 51, 255]
    assert mapped(np.array([-300.0, 0.0, 300.0], np.float32), "full") == [0, 128, 255]


def test_large_images_use_a_sample_of_their_values() -> None:
    values = np.random.default_rng(0).random(3 * 2**20)
    exact = np.percentile(values, [0.1, 99.9])
    wanted = np.rint(((values - exact[0]) / (exact[1] - exact[0])).clip(0, 1) * 255)
    assert np.abs(np.asarray(mapped(values)) - wanted).max() <= 1


@pytest.mark.parametrize("value", ["Auto", "", [1.0], [1, 1], [2, 1], [0, float("nan")], [0, True], [0, 1, 2]])
def test_wrong_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"dataset\.value_range is .* auto, full, or two numbers"):
        parse_value_range(value)


def test_parsed_values() -> None:
    assert [parse_value_range(value) for value in ("auto", "full", [0, 4095])] == ["auto", "full", (0.0, 4095.0)]
