"""Image formats that are read: names of Pillow's formats, file extensions, and detection of the format by content.

Pillow can also start external programs (Ghostscript for EPS files) and opens formats that are not images. Therefore
only the formats in this module are passed to Pillow.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, UnidentifiedImageError

# Pillow tries formats in this order. The formats that Pillow loads at first use are last, because loading takes 50 ms.
_COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM")
_OTHERS = ("TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "PSD", "QOI", "DDS", "SGI", "FITS", "DIB", "ICO", "PCX", "TGA")
# Extensions of files that belong to a dataset. Files with other extensions are not listed.
EXTENSIONS = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "apng",
        "gif",
        "bmp",
        "dib",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "pfm",
        "tif",
        "tiff",
        "webp",
        "avif",
        "avifs",
        "jp2",
        "j2k",
        "j2c",
        "jpc",
        "jpf",
        "jpx",
        "psd",
        "qoi",
        "dds",
        "sgi",
        "fits",
        "fit",
        "pcx",
        "tga",
    ]
)
HEIF_EXTENSIONS = frozenset(["heic", "heif", "hif"])
EXTENSIONS_UNTIL_0_2 = ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|P[1-7fF]\s|II[*+]\0|MM\0[*+]|RIFF.{4}WEBP|8BPS\0\x01"
    rb"|qoif|DDS |\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51|SIMPLE  =|.{4}ftyp(?:avi[fs]|hei[cxms]|hev[cx]|mi[fa]1|msf1)",
    re.DOTALL,
)
START_BYTES = 32  # number of bytes that `is_image_start` needs


@cache
def has_heif() -> bool:
    """Return whether the package pillow-heif is installed."""
    return find_spec("pillow_heif") is not None


@cache
def listed_extensions() -> frozenset[str]:
    """Return the extensions of image files on this machine. HEIC files are included if pillow-heif is installed."""
    return EXTENSIONS | HEIF_EXTENSIONS if has_heif() else EXTENSIONS


def extension_of(name: str) -> str:
    """Return the extension of a file name in lower case, without the dot. Return "" if there is no extension."""
    return Path(name).suffix[1:].lower()


def is_image_start(start: bytes) -> bool:
    """Return whether the first `START_BYTES` bytes of a file are those of an image format."""
    return _START.match(start) is not None and (has_heif() or not _is_heif(start))


def _is_heif(content: bytes) -> bool:
    return content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS


@cache
def _other_formats() -> tuple[str, ...]:
    """Return the formats in `_OTHERS` that this installation of Pillow can read."""
    Image.init()
    if has_heif():
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _OTHERS if name in Image.OPEN)


def open_image(content: bytes) -> Image.Image:
    """Open an encoded image with Pillow, without decoding it. Only the content determines the format.

    Raises UnidentifiedImageError if the format is not one of the formats of this module. Pillow raises other
    exceptions of nearly any type for damaged files.
    """
    try:
        return Image.open(io.BytesIO(content), formats=_COMMON)
    except UnidentifiedImageError:
        pass
    try:
        return Image.open(io.BytesIO(content), formats=_other_formats())
    except UnidentifiedImageError:
        raise UnidentifiedImageError(_reason(content)) from None


def _reason(content: bytes) -> str:
    """Return why the format of `content` is not read."""
    if _is_heif(content):
        return 'HEIC images need the package pillow-heif: pip install "sslcli[heic]"'
    if content.startswith(b"%!PS") or content.startswith(b"\xc5\xd0\xd3\xc6"):
        return "the content is PostScript, which is not read: convert it to PNG"
    if content.startswith(b"%PDF"):
        return "the content is PDF, which is not read: convert it to PNG"
    return "the content has no known image format"


def parse_extensions(extensions: Iterable[str] | None) -> frozenset[str] | None:
    """Return the extensions of `dataset.extensions` in lower case without dots. None stands for all image files.

    Raises ValueError unless `extensions` is None or a list of extensions that is not empty.
    """
    if extensions is None:
        return None
    if isinstance(extensions, (str, Mapping)) or not isinstance(extensions, Iterable):
        raise ValueError(f"dataset.extensions is {extensions!r}, but it must be a list such as [jpg, png], or null")
    found = [str(each).lower().removeprefix(".") for each in extensions]
    if not found or not all(re.fullmatch(r"\w+", each) for each in found):
        raise ValueError(
            f"dataset.extensions is {list(extensions)}, but each extension must consist of letters and digits, such as "
            "[jpg, png]: correct it, or set it to null for all image files"
        )
    return frozenset(found)


def describe_left_out(counts: Mapping[str, int]) -> str:
    """Return the number of files per extension as text, the most frequent extension first.

    If pillow-heif is not installed and HEIC files are left out, the text names the package.
    """
    parts = []
    for extension, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        parts.append(f"{count} {f'.{extension}' if extension else 'without an extension'}")
    hint = ""
    if HEIF_EXTENSIONS & counts.keys() and not has_heif():
        hint = '; HEIC files need the package pillow-heif: pip install "sslcli[heic]"'
    return ", ".join(parts) + hint
