"""Images with the number of channels and the value range of the configuration."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from small_tiffs import RGB, needs_tifffile, save_tiff
from sslcli.data.bad_images import BadImage
from sslcli.data.decode import Encoded, decode, open_file
from sslcli.data.pixel_format import LEGACY, PixelFormat, pixel_format, to_rgb

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes, channels: int, value_range: Any = "auto", divisor: int = 1) -> np.ndarray:
    found = Encoded(content, "x", pixel_format=pixel_format(channels, value_range)).decode(divisor)
    return np.asarray(found)


ORDINARY = {
    "gray png": encoded(Image.fromarray(NOISE[..., 0]), "PNG"),
    "rgb png": encoded(Image.fromarray(NOISE[..., :3]), "PNG"),
    "rgba png": encoded(Image.fromarray(NOISE), "PNG"),
    "gray and alpha": encoded(Image.fromarray(NOISE[..., :2]), "PNG"),
    "palette": encoded(Image.fromarray(NOISE[..., :3]).quantize(30), "PNG"),
    "palette with transparency": encoded(Image.fromarray(NOISE[..., :3]).quantize(30), "PNG", transparency=3),
    "bilevel": encoded(Image.fromarray(NOISE[..., 0]).convert("1"), "PNG"),
    "gray jpeg": encoded(Image.fromarray(NOISE[..., 0]), "JPEG"),
    "rgb jpeg": encoded(Image.fromarray(NOISE[..., :3]), "JPEG"),
    "cmyk jpeg": encoded(Image.fromarray(NOISE[..., :3]).convert("CMYK"), "JPEG"),
    "gif": encoded(Image.fromarray(NOISE[..., 0]), "GIF"),
    "rgb tiff": encoded(Image.fromarray(NOISE[..., :3]), "TIFF"),
    "webp": encoded(Image.fromarray(NOISE[..., :3]), "WEBP"),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_images_of_8_bits_have_the_pixels_of_pillow(name: str, tmp_path: Path) -> None:
    content = ORDINARY[name]
    (tmp_path / "a").write_bytes(content)
    wanted = decode(str(tmp_path / "a"))
    for value_range in ("auto", "full"):
        assert np.array_equal(pixels(content, 3, value_range), wanted)
        assert np.array_equal(pixels(content, 1, value_range)[..., 0], wanted.convert("L"))
    assert np.array_equal(pixels(content, 3, [0, 255]), wanted)
    brighter = np.rint(np.asarray(wanted).clip(0, 100) / 100 * 255)
    if name not in ("rgba png", "gray and alpha", "palette with transparency"):
        assert np.array_equal(pixels(content, 3, [0, 100]), brighter)


@pytest.mark.parametrize("divisor", [1, 2, 4])
@pytest.mark.parametrize("name", ["gray jpeg", "rgb jpeg", "cmyk jpeg"])
def test_jpegs_become_gray_at_every_scale(name: str, divisor: int) -> None:
    color = Image.fromarray(pixels(ORDINARY[name], 3, divisor=divisor))
    found = pixels(ORDINARY[name], 1, divisor=divisor)
    assert found.shape == (-(-20 // divisor), -(-30 // divisor), 1)
    assert np.array_equal(found[..., 0], color.convert("L"))


def test_four_channels_are_the_bands_of_the_file() -> None:
    assert np.array_equal(pixels(ORDINARY["rgba png"], 4), NOISE)
    assert np.array_equal(pixels(ORDINARY["gray and alpha"], 2), NOISE[..., :2])


@pytest.mark.parametrize(("name", "count"), [("rgb jpeg", 3), ("gray png", 1), ("rgba png", 4), ("palette", 3)])
def test_images_with_another_number_of_bands_are_refused(name: str, count: int) -> None:
    with pytest.raises(BadImage, match=rf"the image has {count} bands?, but dataset.channels is 5"):
        pixels(ORDINARY[name], 5)


@needs_tifffile
@pytest.mark.parametrize("planar", [False, True])
def test_bands_of_tiffs_become_channels(tmp_path: Path, planar: bool) -> None:
    values = np.random.default_rng(1).integers(0, 4096, (6, 7, 5), np.uint16)
    values[0, 0, 0] = 4095
    content = save_tiff(tmp_path / "a.tif", values, planar=planar).read_bytes()
    assert np.array_equal(pixels(content, 5), np.rint(values / 4095 * 255))
    assert np.array_equal(pixels(content, 5, "full"), np.rint(values / 65535 * 255))
    assert np.array_equal(pixels(content, 5, [100, 2000]), np.rint(((values - 100.0) / 1900).clip(0, 1) * 255))
    for channels in (1, 3, 4):
        with pytest.raises(BadImage, match=f"has 5 bands, but dataset.channels is {channels}"):
            pixels(content, channels)


@needs_tifffile
def test_three_bands_of_16_bits_or_floats_become_rgb_and_gray(tmp_path: Path) -> None:
    deep = np.random.default_rng(1).integers(0, 4096, (6, 7, 3), np.uint16)
    deep[0, 0, 0] = 4095
    wanted = np.rint(deep / 4095 * 255).astype(np.uint8)
    for options in ({"photometric": RGB}, {}):
        content = save_tiff(tmp_path / "a.tif", deep, **options).read_bytes()
        assert np.array_equal(pixels(content, 3), wanted)
        assert np.array_equal(pixels(content, 1)[..., 0], Image.fromarray(wanted).convert("L"))
    rgb = save_tiff(tmp_path / "b.tif", deep, photometric=RGB).read_bytes()
    assert np.array_equal(pixels(rgb, 3, "full"), deep >> 8)  # Pillow, as in older versions
    floats = save_tiff(tmp_path / "c.tif", deep.astype(np.float32)).read_bytes()
    assert np.array_equal(pixels(floats, 3, [0, 4095]), wanted)


def test_gray_images_of_more_bits_use_the_value_range(tmp_path: Path) -> None:
    deep = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    content = encoded(Image.fromarray(deep), "PNG")
    wanted = np.rint(deep / 4095 * 255)
    assert np.array_equal(pixels(content, 1)[..., 0], wanted)
    assert np.array_equal(pixels(content, 3), np.repeat(wanted[..., None], 3, 2))
    assert len(np.unique(pixels(content, 3, "full"))) == 17
    floats = deep.astype(np.float32)
    floats[0] = -9999
    content = save_tiff(tmp_path / "a.tif", floats[..., None], nodata="-9999").read_bytes()
    assert len(np.unique(pixels(content, 1))) == 256
    assert len(np.unique(pixels(content, 1, "full"))) < 110


def test_the_format_of_version_0_2_has_no_identity_and_others_differ() -> None:
    formats = [PixelFormat(c, r) for c in (1, 3, 5) for r in ("auto", "full", (0.0, 5.0), (0.0, 6.0))]
    assert LEGACY in formats
    assert LEGACY.identity == b""
    assert len({each.identity for each in formats}) == len(formats)


@pytest.mark.parametrize("channels", [0, -1, True, 1.5, "3"])
def test_wrong_numbers_of_channels_are_refused(channels: Any) -> None:
    with pytest.raises(ValueError, match=r"dataset\.channels is "):
        pixel_format(channels, "auto")


def test_the_default_of_open_file_is_that_of_version_0_2(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_file(str(tmp_path / "a.png")).decode()).max() == 16


def test_rgb_of_a_float_image_keeps_its_gray_levels_beside_missing_pixels() -> None:
    values = np.random.default_rng(0).random((40, 40)).astype(np.float32)
    values[0] = -3.4e38
    image = Image.fromarray(values)
    assert len(np.unique(np.asarray(to_rgb(image)))) > 100
    assert len(np.unique(np.asarray(to_rgb(image, "full")))) == 2
    twelve = Image.fromarray((np.arange(1600, dtype=np.uint16) * 2).reshape(40, 40))
    assert len(np.unique(np.asarray(to_rgb(twelve)))) > 190
