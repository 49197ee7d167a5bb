"""Pixel values of image files in full precision, and images with any number of bands.

Pillow reduces color images of 16 bits per channel to 8 bits. Most TIFFs with many bands cannot be opened with Pillow.
If Pillow opens such a TIFF, it may return only the first band. The optional package tifffile reads TIFFs without these
losses.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from sslcli.data.image_formats import open_image

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _FORMAT, _NODATA = 258, 262, 277, 338, 339, 42113  # tags of TIFF
_MINISBLACK, _RGB, _UNSIGNED = 1, 2, 1
_ALPHA = (1, 2)  # values of the tag ExtraSamples
_PNG_COLORS = (2, 6)  # color types RGB and RGBA
_MODES = {"RGBA": 4, "RGBX": 4, "LA": 2}  # modes of Pillow whose channels are the bands of the file


@dataclass(frozen=True)
class Samples:
    """Pixel values of an image, before they are mapped to 8 bits.

    Attributes:
        values: (H, W, B) integers or floats; B is the number of bands.
        num_colors: 1 = the first band is gray; 3 = the first three bands are RGB; 0 = no band is a color.
        alpha: index of the band with the transparency; None = there is none.
        nodata: the value of missing pixels; None = unknown.
    """

    values: NDArray[Any]
    num_colors: int
    alpha: int | None = None
    nodata: float | None = None


def is_deep(image: Image.Image) -> bool:
    """Return whether an image opened by Pillow has a single gray band of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def has_lost_bands(image: Image.Image, *, only_colors: bool) -> bool:
    """Return whether Pillow would decode only some of the bands of a file. This happens only for TIFFs.

    image: the file, opened by Pillow.
    only_colors: if True, only red, green and blue are needed, and the loss of other bands is ignored.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    count, decoded = image.tag_v2.get(_SAMPLES, 1), len(image.getbands())
    has_colors = image.tag_v2.get(_PHOTOMETRIC) == _RGB and decoded >= 3
    return count > decoded and not (only_colors and has_colors)


def has_lost_precision(image: Image.Image, content: bytes) -> bool:
    """Return whether a file stores more than 8 bits per value, of which Pillow would decode only 8 bits.

    image: the file, opened by Pillow.
    content: the bytes of the file.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return not is_deep(image) and max(image.tag_v2.get(_BITS, (1,))) > 8
    header = content[:26]  # bytes 24 and 25 of a PNG are the bit depth and the color type
    return image.format == "PNG" and header[24] == 16 and header[25] in _PNG_COLORS


def samples_of(image: Image.Image) -> Samples:
    """Return the pixel values of an image that Pillow decodes. Images in palette, CMYK and YCbCr modes become RGB."""
    tags: Any = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    nodata = _number(tags.get(_NODATA))
    if is_deep(image):
        values: NDArray[Any] = np.asarray(image)
        is_unsigned = tags.get(_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED
        if values.dtype == np.int32 and tags.get(_BITS) == (32,) and is_unsigned:
            values = values.view(np.uint32)
        return Samples(values[:, :, None], 1, nodata=nodata)
    if image.mode == "L" and "transparency" not in image.info:
        return Samples(np.asarray(image)[:, :, None], 1, nodata=nodata)
    if image.mode in ("PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in _MODES:
        count = _MODES[image.mode]
        return Samples(np.asarray(image), count - 1, None if image.mode == "RGBX" else count - 1, nodata)
    return Samples(np.asarray(image.convert("RGB")), 3, nodata=nodata)


class DeepPng:
    """An opened PNG with the mode RGB or RGBA and 16 bits per channel.

    Pillow returns only 8 of the 16 bits of a value. Therefore Pillow decodes the file twice: once to the high byte of
    each value, and once to the low byte.

    Args:
        content: the bytes of the file.

    Attributes:
        size: width and height in pixels.
    """

    def __init__(self, content: bytes) -> None:
        self.high, self.low = open_image(content), open_image(content)
        self.size = self.high.size
        assert isinstance(self.low, ImageFile.ImageFile)
        # Values in a PNG are big-endian, and Pillow keeps the high byte. If it takes the values for little-endian, it
        # keeps the other byte, which is the low byte.
        ((decoder, extents, offset, mode),) = self.low.tile
        self.low.tile = [(decoder, extents, offset, f"{str(mode)[:-1]}L")]  # type: ignore[list-item]

    def read(self) -> Samples:
        """Decode the pixel values. Raises exceptions of many types if the file is damaged."""
        with self.high, self.low:
            values = np.asarray(self.high).astype(np.uint16) << 8 | np.asarray(self.low)
        return Samples(values, 3, 3 if values.shape[2] == 4 else None)


class TiffBands:
    """An opened TIFF that the package tifffile decodes. Only the first page is used.

    Args:
        content: the bytes of the file.

    Attributes:
        size: width and height in pixels.

    Raises ValueError if tifffile is not installed, or if the layout of the file is not supported.
    """

    def __init__(self, content: bytes) -> None:
        self.page = _tiff_file(content).pages[0]
        page = self.page
        self.size: tuple[int, int] = (page.imagewidth, page.imagelength)
        if page.photometric not in (_MINISBLACK, _RGB):
            raise ValueError(f"a TIFF with the photometric interpretation {page.photometric.name} is not supported")
        if page.imagedepth > 1:
            raise ValueError("a TIFF with a depth is not supported")
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)  # Pillow raises an error above the same limit
        if page.imagewidth * page.imagelength > limit:
            raise ValueError(f"the image has {page.imagewidth * page.imagelength} pixels, but at most {limit} are read")

    @property
    def count(self) -> int:
        """Number of bands."""
        return int(self.page.samplesperpixel)

    def read(self) -> Samples:
        """Decode the pixel values. Raises exceptions of many types if the file is damaged."""
        page, (width, height) = self.page, self.size
        values = page.asarray()
        if page.planarconfig == 2 and self.count > 1:
            values = np.moveaxis(values.reshape(self.count, height, width), 0, 2)
        values = values.reshape(height, width, self.count)
        is_rgb = page.photometric == _RGB and self.count >= 3
        num_colors = 3 if is_rgb or self.count == 3 else 1
        extra = page.extrasamples
        has_alpha = len(extra) > 0 and int(extra[0]) in _ALPHA and self.count == num_colors + 1
        if not is_rgb and self.count not in (1, 3) and not has_alpha:
            num_colors = 0
        nodata = page.tags.get(_NODATA)
        found = None if nodata is None else _number(nodata.value)
        return Samples(np.ascontiguousarray(values), num_colors, num_colors if has_alpha else None, found)


def _tiff_file(content: bytes) -> Any:
    """Open the bytes of a TIFF as a `tifffile.TiffFile`. Raises ValueError if tifffile is not installed."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            "Pillow does not read TIFFs with these bands or data types: install the package tifffile (pip install "
            "tifffile imagecodecs)"
        ) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors are also raised as exceptions
    return tifffile.TiffFile(io.BytesIO(content))


def _number(text: object) -> float | None:
    """Return the value of a TIFF tag as a number, or None if the value is not a number."""
    try:
        return float(str(text).strip("\0 \n"))
    except ValueError:
        return None
