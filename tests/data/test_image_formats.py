"""Formats of image files: which are read, and which never reach Pillow's decoders."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, UnidentifiedImageError

from sslcli.data import image_formats
from sslcli.data.bad_images import BadImage
from sslcli.data.decode import decode
from sslcli.data.image_formats import (
    COMMON,
    EXTENSIONS,
    EXTENSIONS_BY_FORMAT,
    HEIF_EXTENSIONS,
    OTHERS,
    START_BYTES,
    describe_left_out,
    extension_of,
    is_image_start,
    listed_extensions,
    open_image,
    other_formats,
    parse_extensions,
)

HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
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
    assert set(other_formats()) >= set(OTHERS) - {"AVIF", "WEBP", "JPEG2000", "HEIF"}  # optional


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
        (HEIC_START, "HEIC.*pip install pillow-heif"),
        (b"no image", "no known image format"),
        (b"", "no known image format"),
    ],
)
def test_other_content_is_refused_with_the_reason(content: bytes, why: str) -> None:
    with pytest.raises(UnidentifiedImageError, match=why):
        open_image(content)


def test_the_listed_extensions_are_those_of_formats_that_are_read() -> None:
    assert set(EXTENSIONS_BY_FORMAT) <= {*COMMON, *OTHERS}
    Image.init()
    for extension in EXTENSIONS - {"avif", "avifs"}:
        known = Image.EXTENSION.get(f".{extension}", {"fit": "FITS"}.get(extension))
        assert known in (*COMMON, *OTHERS), extension


@pytest.mark.parametrize("format_name", sorted(set(WRITABLE) - {"DIB", "ICO", "SGI", "PCX", "TGA"}))
def test_the_first_bytes_of_an_image_are_recognized(format_name: str) -> None:
    assert is_image_start(encoded(format_name)[:START_BYTES])


@pytest.mark.parametrize("start", [b"", b"BM", b"Path,label", b"#!/bin/sh\n", b"%!PS-Adobe", b"\x89PN"])
def test_the_first_bytes_of_other_files_are_not_those_of_an_image(start: bytes) -> None:
    assert not is_image_start(start)


@pytest.mark.parametrize(
    ("name", "extension"),
    [("a.JPG", "jpg"), ("a.tar.gz", "gz"), ("a", ""), ("a.", ""), ("Dr. Who", " who"), (".png", "")],
)
def test_the_extension_is_in_lower_case_without_the_dot(name: str, extension: str) -> None:
    assert extension_of(name) == extension


def test_left_out_files_are_counted_by_extension() -> None:
    assert describe_left_out({"txt": 2, "": 3, "csv": 2}) == "3 without an extension, 2 .csv, 2 .txt"
    many = {f"{number:03}": 1 for number in range(200)} | {"txt": 9}
    assert describe_left_out(many) == "9 .txt, 1 .000, 1 .001, 1 .002, 1 .003, 196 with 196 other extensions"


def test_extensions_of_the_configuration_are_normalized() -> None:
    assert parse_extensions([".JPG", "png"]) == {"jpg", "png"}
    assert parse_extensions(None) is None


@pytest.fixture
def set_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Install or remove the package pillow-heif. The installed package opens every HEIC file as a black image."""
    cached = (image_formats.listed_extensions, image_formats.other_formats)

    def register_heif_opener() -> None:
        monkeypatch.setitem(
            Image.OPEN, "HEIF", (lambda file, name: Image.new("RGB", (9, 7)), lambda start: b"ftyp" in start)
        )

    def install(is_installed: bool) -> None:
        monkeypatch.setattr(image_formats, "has_heif", lambda: is_installed)
        package = SimpleNamespace(register_heif_opener=register_heif_opener)
        monkeypatch.setitem(sys.modules, "pillow_heif", package)
        for function in cached:
            function.cache_clear()

    yield install
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def test_heic_files_are_listed_and_read_if_pillow_heif_is_installed(set_heif: Callable[[bool], None]) -> None:
    set_heif(True)
    assert listed_extensions() == EXTENSIONS | HEIF_EXTENSIONS
    assert is_image_start(HEIC_START)
    assert open_image(HEIC_START).size == (9, 7)
    assert describe_left_out({"heic": 2}) == "2 .heic"


def test_heic_files_are_named_with_the_package_that_they_need(set_heif: Callable[[bool], None]) -> None:
    set_heif(False)
    assert listed_extensions() == EXTENSIONS
    assert not is_image_start(HEIC_START)
    assert describe_left_out({"heic": 2, "txt": 1}) == (
        "2 .heic, 1 .txt. HEIC files need the package pillow-heif: pip install pillow-heif, or convert them to JPEG or "
        "PNG"
    )
    with pytest.raises(UnidentifiedImageError, match="pip install pillow-heif"):
        open_image(HEIC_START)
