"""Decoding of image files. JPEGs can be decoded at 1/2, 1/4 or 1/8 of their size.

Common JPEGs are decoded by simplejpeg. It returns the same pixels as PIL and takes three quarters of PIL's time, or a
sixth for small JPEGs. PIL decodes most other files, see also `sslcli.data.bands`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from sslcli.data.bad_images import BadImage
from sslcli.data.bands import TIFF_STARTS, DeepPng, TiffBands, has_lost_bands
from sslcli.data.image_formats import open_image
from sslcli.data.pixel_format import LEGACY, PixelFormat, to_rgb
from sslcli.data.pixels import Pixels
from sslcli.system.regular_files import read_regular

DIVISORS = (1, 2, 4, 8)
MAX_FILE_BYTES = 512 * 10**6  # the largest photographs have files of about a tenth of this size


class Encoded:
    """An encoded image of known size. The header has been read, and the pixels are decoded on request.

    - If an image has several frames, the first frame is used.
    - The EXIF orientation of a JPEG is ignored, as in the usual ImageNet loaders.

    Args:
        content: the bytes of the file.
        path: path of the file, for error messages.
        pixel_format: the number of channels of the decoded image, and the mapping of pixel values to 8 bits.

    Attributes:
        size: width and height in pixels of the full-size image.

    Raises BadImage if `content` is not an image.
    """

    def __init__(self, content: bytes, path: str, *, pixel_format: PixelFormat = LEGACY) -> None:
        self.content, self.path, self.pixel_format = content, path, pixel_format
        if not content:
            raise BadImage(path, "the file is empty")
        # The opened file. It is None if `decode_jpeg` decodes the file.
        self.opened: Image.Image | TiffBands | DeepPng | None = None
        size = jpeg_size(content) if pixel_format.is_color and pixel_format.keeps_8_bits else None
        if size is None:
            self.opened = self.open()
            size = self.opened.size
        self.size = size

    def open(self) -> Image.Image | TiffBands | DeepPng:
        """Open the file without decoding it. Raises BadImage if `content` is not an image."""
        try:
            try:
                image = open_image(self.content)
            except UnidentifiedImageError:
                if not self.content.startswith(TIFF_STARTS):
                    raise
                return TiffBands(self.content)
            if self.pixel_format.needs_samples(image, self.content):
                return TiffBands(self.content) if image.format == "TIFF" else DeepPng(self.content)
            return image
        # Decoders raise nearly any exception type for damaged files, here and below.
        except Exception as error:
            raise self.bad_image(error) from error

    def decode(self, divisor: int = 1) -> Image.Image | Pixels:
        """Decode the pixels. This method can be called only once.

        divisor: 1, 2, 4 or 8. If each side of a JPEG has at least `divisor` pixels, the JPEG is decoded at 1/divisor of
            its size, rounded up. For other formats, the divisor has no effect.

        Raises BadImage if the file is damaged or truncated, or if it has the wrong number of bands.
        """
        if self.opened is None:
            try:
                image = decode_jpeg(self.content, self.size, divisor)
            except ValueError:
                # PIL can decode some files that `decode_jpeg` rejects. If PIL rejects the file too, its error names the
                # damage.
                self.opened = self.open()
            else:
                if self.pixel_format.channels == 3:
                    return image
                return self.pixel_format.from_rgb(Image.fromarray(np.asarray(image)))
        try:
            if not isinstance(self.opened, Image.Image):
                return self.pixel_format.convert_samples(self.opened.read())
            with self.opened as opened:
                if divisor > 1:
                    # PIL selects the scale from the requested size. For this size, it selects 1 / `divisor`.
                    opened.draft(None, (max(1, opened.width // divisor), max(1, opened.height // divisor)))
                return self.pixel_format.convert(opened)
        except Exception as error:
            raise self.bad_image(error) from error

    def bad_image(self, error: Exception) -> BadImage:
        """Return a BadImage for this file. Its reason is the message of `error`."""
        return BadImage(self.path, str(error) or type(error).__name__)


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return width and height of a JPEG, or None if `decode_jpeg` does not support it.

    YCbCr and grayscale images are supported if they do not exceed PIL's limit on the number of pixels.
    """
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    is_supported = colors in ("YCbCr", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
    return (width, height) if is_supported else None


def decode_jpeg(content: bytes, size: tuple[int, int], divisor: int) -> Image.Image | Pixels:
    """Decode a JPEG of `size` (width, height) to RGB at 1/divisor of its size.

    divisor: 1, 2, 4 or 8.

    Raises ValueError if the JPEG is damaged, or if `divisor` is above 1 and both sides have fewer than 8 pixels.
    """
    if divisor == 1:
        return Pixels(simplejpeg.decode_jpeg(content, "RGB"))
    if max(size) < 8:
        raise ValueError(f"the image size {size} is too small to select the scale 1/{divisor} by its result's size")
    # libjpeg scales by multiples of 1/8. It selects the smallest scale with which the result has at least this size.
    width, height = (-(-side // divisor) for side in size)
    return Image.fromarray(simplejpeg.decode_jpeg(content, "RGB", min_width=width, min_height=height))


def open_file(path: str, *, pixel_format: PixelFormat = LEGACY) -> Encoded:
    """Open an image file; see `Encoded`. All datasets of single image files use this function.

    Raises BadImage if the file cannot be read, is not a regular file, has more than `MAX_FILE_BYTES`, or is not an
    image.
    """
    return Encoded(read_file(path), path, pixel_format=pixel_format)


def full_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image to RGB. Values of more than 8 bits are mapped to 8 bits by the rule "full" of `to_8_bits`."""
    return to_rgb(image, "full")


def decode(path: str, *, convert: Callable[[Image.Image], Image.Image] = full_rgb) -> Image.Image:
    """Decode an image file with PIL alone, and return the result of `convert` for the decoded image.

    Raises BadImage if the file cannot be read, is not a regular file, has more than `MAX_FILE_BYTES`, is not an image,
    or is a TIFF with more bands than PIL would decode. A TIFF of which PIL decodes red, green and blue is accepted,
    even if it has further bands.
    """
    content = read_file(path)
    try:
        with open_image(content) as image:
            if has_lost_bands(image, only_colors=True):
                raise ValueError(f"the file has several bands, of which Pillow reads only {len(image.getbands())}")
            return convert(image)
    except Exception as error:
        raise BadImage(path, str(error) or type(error).__name__) from error


def read_file(path: str) -> bytes:
    """Return the content of an image file.

    Raises BadImage if the file cannot be read, is not a regular file, or has more than `MAX_FILE_BYTES`.
    """
    try:
        return read_regular(path, most=MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise BadImage(path, getattr(error, "strerror", None) or str(error)) from error
