"""Formats of image files: which are read, and which never reach Pillow's decoders."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from sslcli.data.bad_images import BadImage
from sslcli.data.decode import decode
from sslcli.data.image_formats import COMMON, OTHERS, open_image, other_formats

WRITABLE = ["JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "DDS", "SGI", "DIB", "ICO", "PCX", "TGA"]


def encoded(format_name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 40)).save(file, format_name)
    return file.getvalue()


@pytest.mark.parametrize("format_name", WRITABLE)
def test_the_content_determines_the_format(format_name: str) -> None:
    image = open_image(encoded(format_name))
    assert image.format in {format_name, "BMP"}  # a DIB is a BMP without its file header
    assert image.size == (16, 16)


def test_the_listed_formats_exist_in_pillow() -> None:
    Image.init()
    assert set(COMMON) <= set(Image.OPEN)
    assert set(other_formats()) >= set(OTHERS) - {"AVIF", "WEBP", "JPEG2000"}  # optional parts of Pillow


def test_no_listed_format_starts_a_program() -> None:
    assert not {"EPS", "WMF", "GRIB", "BUFR", "HDF5", "MPEG", "PDF"} & {*COMMON, *OTHERS}


def test_postscript_named_png_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Popen", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "005.png").write_bytes(encoded("EPS"))
    with pytest.raises(BadImage, match="PostScript, which is not read: convert it to PNG"):
        decode(str(tmp_path / "005.png"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"%PDF-1.7 ...", "PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"no image", "no known image format"),
        (b"", "no known image format"),
    ],
)
def test_other_content_is_refused_with_the_reason(content: bytes, why: str) -> None:
    with pytest.raises(UnidentifiedImageError, match=why):
        open_image(content)
