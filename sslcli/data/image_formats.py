"""Image formats that are read: file extensions, detection of the format by content, and opening with Pillow.

The extension of a file, or its content if there is no extension, determines whether it belongs to a dataset. Only the
content determines its format. Pillow also opens formats for which it starts an external program (Ghostscript for EPS
files) or a handler of another package. Therefore, only the formats in this module are passed to Pillow.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

# Pillow tries formats in this order. It loads the decoders of OTHERS at first use, which takes 50 ms.
COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM")
OTHERS = ("TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "PSD", "QOI", "DDS", "SGI", "FITS", "DIB", "ICO", "PCX", "TGA")
# Extensions of files that belong to a dataset, by format. Files with other extensions are left out.
EXTENSIONS_BY_FORMAT = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png", "apng"),
    "GIF": ("gif",),
    "BMP": ("bmp", "dib"),
    "PPM": ("ppm", "pgm", "pbm", "pnm", "pfm"),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "AVIF": ("avif", "avifs"),
    "JPEG2000": ("jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
    "PSD": ("psd",),
    "QOI": ("qoi",),
    "DDS": ("dds",),
    "SGI": ("sgi",),
    "FITS": ("fits", "fit"),
    "PCX": ("pcx",),
    "TGA": ("tga",),
}
EXTENSIONS = frozenset(extension for names in EXTENSIONS_BY_FORMAT.values() for extension in names)
HEIF_EXTENSIONS = frozenset(["heic", "heif", "hif"])
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
HEIF_REMEDY = "HEIC files need the package pillow-heif: pip install pillow-heif, or convert them to JPEG or PNG"
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # first bytes of PostScript files
START_BYTES = 32  # number of bytes that `is_image_start` needs
_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|P[1-7fF]\s|II[*+]\0|MM\0[*+]|RIFF.{4}WEBP|8BPS\0\x01"
    rb"|qoif|DDS |\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51|SIMPLE  =|.{4}ftyp(?:avi[fs]|hei[cxms]|hev[cx]|mi[fa]1|msf1)",
    re.DOTALL,
)
_MAX_SHOWN = 5  # number of extensions in the message about files that are left out


@cache
def has_heif() -> bool:
    """Return whether the optional package pillow-heif is installed."""
    return find_spec("pillow_heif") is not None


@cache
def listed_extensions() -> frozenset[str]:
    """Return the extensions of the files that are read as images.

    These are `EXTENSIONS` and, if pillow-heif is installed, the extensions of HEIC files.
    """
    return EXTENSIONS | HEIF_EXTENSIONS if has_heif() else EXTENSIONS


def extension_of(name: str) -> str:
    """Return the extension of a file name in lower case, without the dot. Return "" if there is no extension."""
    stem, _, extension = name.rpartition(".")
    return extension.lower() if stem else ""


def is_image_start(start: bytes) -> bool:
    """Return whether the first `START_BYTES` bytes of a file are the beginning of an image that sslcli can read."""
    return _START.match(start) is not None and (has_heif() or not is_heif(start))


def is_heif(content: bytes) -> bool:
    """Return whether the content of a file begins as a HEIC or HEIF file does."""
    return content[4:8] == b"ftyp" and content[8:12] in HEIF_BRANDS


@cache
def other_formats() -> tuple[str, ...]:
    """Return the formats in `OTHERS` that this installation of Pillow can read."""
    Image.init()
    if has_heif():
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in OTHERS if name in Image.OPEN)


def open_image(content: bytes) -> Image.Image:
    """Open an encoded image with Pillow, without decoding it.

    Raises UnidentifiedImageError if the format of `content` is not in `COMMON` or `OTHERS`. For damaged files, Pillow
    raises exceptions of nearly any type.
    """
    try:
        return Image.open(io.BytesIO(content), formats=COMMON)
    except UnidentifiedImageError:
        pass
    try:
        return Image.open(io.BytesIO(content), formats=other_formats())
    except UnidentifiedImageError:
        raise UnidentifiedImageError(reason(content)) from None


def size_of(file: BinaryIO) -> tuple[int, int] | None:
    """Return width and height of an image file in pixels from its header, or None if the header cannot be read."""
    try:
        with Image.open(file, formats=(*COMMON, *other_formats())) as image:
            return int(image.width), int(image.height)
    except Exception:  # Pillow raises exceptions of nearly any type for damaged files
        return None


def reason(content: bytes) -> str:
    """Return the reason why an image with this content cannot be read, for messages."""
    if content.startswith(POSTSCRIPT):
        return "the content is PostScript, which is not read: convert it to PNG"
    if content.startswith(b"%PDF"):
        return "the content is PDF, which is not read: convert it to PNG"
    if is_heif(content):
        return "the content is HEIC, but it is damaged" if has_heif() else f"the content is HEIC: {HEIF_REMEDY}"
    return "the content has no known image format"


def parse_extensions(extensions: Iterable[str] | None) -> frozenset[str] | None:
    """Return the extensions of `dataset.extensions` in lower case without dots. None stands for all image files.

    Raises ValueError unless `extensions` is None or a list of extensions that is not empty.
    """
    if extensions is None:
        return None
    if isinstance(extensions, (str, Mapping)) or not isinstance(extensions, Iterable):
        raise ValueError(f"dataset.extensions is {extensions!r}, but it must be a list such as [jpg, png], or null")
    given = list(extensions)
    found = [str(each).lower().removeprefix(".") for each in given]
    if not found or not all(re.fullmatch(r"\w+", each) for each in found):
        raise ValueError(
            f"dataset.extensions is {given}, but it must contain extensions of letters and digits, such as "
            "[jpg, png]: correct it, or set it to null for all image files"
        )
    return frozenset(found)


def describe_left_out(counts: Mapping[str, int]) -> str:
    """Describe the files that a dataset leaves out: their number per extension, the most frequent extension first.

    If HEIC files are left out because pillow-heif is not installed, the text contains the remedy.

    counts: number of these files for each extension; "" = files without an extension.
    """
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {f'.{extension}' if extension else 'without an extension'}" for extension, count in ordered]
    if len(parts) > _MAX_SHOWN + 1:
        others = sum(count for _, count in ordered[_MAX_SHOWN:])
        parts[_MAX_SHOWN:] = [f"{others} with {len(parts) - _MAX_SHOWN} other extensions"]
    is_heif_missing = HEIF_EXTENSIONS & counts.keys() and not has_heif()
    return ", ".join(parts) + (f". {HEIF_REMEDY}" if is_heif_missing else "")
