"""Image formats that sslcli reads. The format of a file is detected from its content, whatever its extension is.

Pillow also opens formats for which it starts an external program (Ghostscript for EPS files) or a handler of another
package. Therefore, only the formats in this module are passed to Pillow.
"""

from __future__ import annotations

import io
from functools import cache

from PIL import Image, UnidentifiedImageError

# Pillow tries formats in this order. It loads the decoders of OTHERS at first use, which takes 50 ms.
COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM")
OTHERS = ("TIFF", "WEBP", "AVIF", "JPEG2000", "PSD", "QOI", "DDS", "SGI", "FITS", "DIB", "ICO", "PCX", "TGA")
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


@cache
def other_formats() -> tuple[str, ...]:
    """Return the formats in `OTHERS` that this installation of Pillow can read."""
    Image.init()
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


def reason(content: bytes) -> str:
    """Return why the format of `content` is not read, for messages."""
    if content.startswith(POSTSCRIPT):
        return "the content is PostScript, which is not read: convert it to PNG"
    if content.startswith(b"%PDF"):
        return "the content is PDF, which is not read: convert it to PNG"
    if content[4:8] == b"ftyp" and content[8:12] in HEIC:
        return "the content is HEIC, which is not read: convert it to JPEG or PNG"
    return "the content has no known image format"
