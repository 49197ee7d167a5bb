"""Pixel values in full precision, from files that Pillow reads with 8 bits, with fewer bands, or not at all."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from small_tiffs import ALPHA, PALETTE, RGB, UNSPECIFIED, needs_tifffile, save_tiff
from sslcli.data.bad_images import BadImage
from sslcli.data.bands import DeepPng, TiffBands, has_lost_bands, has_lost_precision, samples_of
from sslcli.data.decode import open_file
from sslcli.data.pixel_format import PixelFormat


def ramp(count: int, dtype: Any = np.uint16) -> np.ndarray:
    """Values that differ between bands, rows and columns."""
    return (np.arange(6 * 7 * count).reshape(6, 7, count) * 7 + 5).astype(dtype)


def png(values: np.ndarray, *, filtered: int = 0) -> bytes:
    """A PNG of 16 bits with 1, 3 or 4 channels, which Pillow does not write. `filtered` is the filter of its rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, count = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[count], 0, 0, 0)
    rows = np.frombuffer(values.astype(">u2").tobytes(), np.uint8).reshape(height, -1).astype(int)
    padded = np.pad(rows, ((1, 0), (2 * count, 0)))
    left, up, corner = padded[1:, : -2 * count], padded[:-1, 2 * count :], padded[:-1, : -2 * count]
    estimate = left + up - corner
    near = np.stack([np.abs(estimate - each) for each in (left, up, corner)]).argmin(0)
    paeth = np.choose(near, [left, up, corner])
    predicted = [np.zeros_like(rows), left, up, (left + up) // 2, paeth][filtered]
    data = np.concatenate([np.full((height, 1), filtered), (rows - predicted) % 256], 1).astype(np.uint8).tobytes()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@needs_tifffile
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 12])
def test_bands_of_tiffs_are_those_of_the_file(tmp_path: Path, planar: bool, dtype: Any, count: int) -> None:
    values = ramp(count, dtype)
    content = save_tiff(tmp_path / "a.tif", values, planar=planar, nodata="-9999").read_bytes()
    opened = TiffBands(content)
    assert (opened.size, opened.count) == ((7, 6), count)
    samples = opened.read()
    assert np.array_equal(samples.values, values)
    assert samples.values.dtype == dtype
    assert samples.nodata == -9999
    assert (samples.num_colors, samples.alpha) == (3 if count == 3 else 0, None)


@needs_tifffile
@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits", "zstd"])
def test_compressed_and_tiled_tiffs_are_read(tmp_path: Path, compression: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    values = np.random.default_rng(0).integers(0, 4096, (40, 50, 5), np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(
        file, values, photometric="minisblack", planarconfig="contig", compression=compression, tile=(16, 16)
    )
    assert np.array_equal(TiffBands(file.getvalue()).read().values, values)


@needs_tifffile
def test_colors_and_transparency_of_tiffs(tmp_path: Path) -> None:
    cases: list[tuple[int, dict[str, Any], tuple[int, int | None]]] = [
        (3, {"photometric": RGB}, (3, None)),
        (4, {"photometric": RGB, "extra": (ALPHA,)}, (3, 3)),
        (4, {"photometric": RGB, "extra": (UNSPECIFIED,)}, (3, None)),
        (2, {"extra": (ALPHA,)}, (1, 1)),
        (2, {"extra": (UNSPECIFIED,)}, (0, None)),
        (1, {}, (1, None)),
    ]
    for count, options, expected in cases:
        samples = TiffBands(save_tiff(tmp_path / "a.tif", ramp(count), **options).read_bytes()).read()
        assert (samples.num_colors, samples.alpha) == expected, (count, options)


@needs_tifffile
def test_tiffs_whose_values_are_no_colors_and_too_large_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    palette = save_tiff(tmp_path / "a.tif", ramp(1), photometric=PALETTE).read_bytes()
    with pytest.raises(ValueError, match="PALETTE is not supported"):
        TiffBands(palette)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match="42 pixels, but at most 40"):
        TiffBands(save_tiff(tmp_path / "b.tif", ramp(5)).read_bytes())


@needs_tifffile
@pytest.mark.parametrize("keep", [40, 200, 500])
def test_damaged_tiffs_are_bad_images(tmp_path: Path, keep: int) -> None:
    path = save_tiff(tmp_path / "a.tif", np.tile(ramp(5), (4, 4, 1)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadImage):
        open_file(str(path), pixel_format=PixelFormat(5)).decode()


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("count", [2, 4, 5])
def test_without_tifffile_the_message_names_the_package(
    tmp_path: Path, planar: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    path = save_tiff(tmp_path / "a.tif", ramp(count, np.uint8), planar=planar)
    for channels in (1, 3, count):
        with pytest.raises(BadImage, match=r"pip install tifffile imagecodecs"):
            open_file(str(path), pixel_format=PixelFormat(channels)).decode()


@pytest.mark.parametrize("filtered", range(5))
@pytest.mark.parametrize("count", [3, 4])
def test_color_pngs_of_16_bits_keep_them(count: int, filtered: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (6, 7, count), np.uint16)
    content = png(values, filtered=filtered)
    with Image.open(io.BytesIO(content)) as image:
        assert has_lost_precision(image, content)
        assert np.array_equal(np.asarray(image), (values >> 8).astype(np.uint8))
    opened = DeepPng(content)
    assert opened.size == (7, 6)
    samples = opened.read()
    assert np.array_equal(samples.values, values)
    assert (samples.num_colors, samples.alpha) == (3, 3 if count == 4 else None)


def test_cut_color_pngs_of_16_bits_are_bad_images(tmp_path: Path) -> None:
    content = png(np.random.default_rng(0).integers(0, 65536, (60, 70, 3), np.uint16))
    for keep in (30, 200, len(content) // 2):
        (tmp_path / "a.png").write_bytes(content[:keep])
        with pytest.raises(BadImage):
            open_file(str(tmp_path / "a.png"), pixel_format=PixelFormat(3)).decode()


def test_pillow_keeps_16_bits_of_gray_pngs() -> None:
    content = png(ramp(1))
    with Image.open(io.BytesIO(content)) as image:
        assert not has_lost_precision(image, content)
        assert np.array_equal(samples_of(image).values, ramp(1))


def test_bands_that_pillow_leaves_out_are_found(tmp_path: Path) -> None:
    def lost(count: int, *, only_colors: bool, **options: Any) -> bool:
        content = save_tiff(tmp_path / "a.tif", ramp(count, np.uint8), **options).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            return has_lost_bands(image, only_colors=only_colors)

    assert lost(2, only_colors=True)  # Pillow returns the first band
    assert not lost(1, only_colors=True)
    assert not lost(3, photometric=RGB, only_colors=False)
    assert not lost(5, photometric=RGB, only_colors=True)  # red, green, blue and two others
    assert lost(5, photometric=RGB, only_colors=False)


def test_samples_of_pillow_images(tmp_path: Path) -> None:
    def of(mode: str) -> tuple[tuple[int, ...], int, int | None]:
        found = samples_of(Image.new(mode, (7, 6)))
        return found.values.shape, found.num_colors, found.alpha

    assert of("L") == ((6, 7, 1), 1, None)
    assert of("1") == of("P") == of("CMYK") == of("RGB") == ((6, 7, 3), 3, None)
    assert of("LA") == ((6, 7, 2), 1, 1)
    assert of("RGBA") == ((6, 7, 4), 3, 3)
    assert of("RGBX") == ((6, 7, 4), 3, None)
    path = save_tiff(tmp_path / "a.tif", np.array([[[0], [2**32 - 1]]], np.uint32), nodata="7")
    with Image.open(path) as image:
        found = samples_of(image)
    assert found.values.ravel().tolist() == [0, 2**32 - 1]
    assert found.nodata == 7
