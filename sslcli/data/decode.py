"""Decoding of image files to RGB. JPEGs can be decoded at 1/2, 1/4 or 1/8 of their size.

Common JPEGs are decoded by simplejpeg. It returns the same pixels as PIL and takes three quarters of PIL's time, or a
sixth for small JPEGs. PIL decodes all other files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from sslcli.data.bad_images import BadImage
from sslcli.data.image_formats import open_image
from sslcli.system.regular_files import read_regular

DIVISORS = (1, 2, 4, 8)
MAX_FILE_BYTES = 512 * 10**6  # the largest photographs have files of about a tenth of this size


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image to RGB; see `Encoded`. Raises ValueError if its mode cannot be converted to RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.nan_to_num(np.asarray(image, np.float64))
        low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
        if values.min() < low or values.max() > high:
            low, high = values.min(), values.max()
        gray = (values - low) / max(high - low, np.finfo(float).tiny) * 255
        return Image.fromarray(np.rint(gray).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


class Pixels:
    """A picture as a NumPy array (H, W, 3) uint8. `crop` returns a view of the array, `resize` a PIL image."""

    def __init__(self, values: NDArray[np.uint8]) -> None:
        self.values = values
        self.height, self.width = values.shape[:2]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    def crop(self, box: tuple[int, int, int, int]) -> Pixels:
        """Crop the box (left, top, right, bottom). The box must lie inside the picture."""
        left, top, right, bottom = box
        return Pixels(self.values[top:bottom, left:right])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """Return the whole picture resized to (width, height)."""
        return Image.fromarray(self.values).resize(size, resample)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype, copy=True) if copy else np.asarray(self.values, dtype)


class Encoded:
    """An encoded image of known size. The header has been read, and the pixels are decoded on request.

    - Transparent images are composited over white.
    - 16-bit grayscale and floats in [0, 1] are scaled to 8 bits, not clipped. If an image exceeds the range of 16 bits
      or [0, 1], its minimum is mapped to 0 and its maximum to 255.
    - If an image has several frames, the first frame is used.
    - The EXIF orientation of a JPEG is ignored, as in the usual ImageNet loaders.

    Args:
        content: the bytes of the file.
        path: path of the file, for error messages.
        convert: function that converts the image after PIL has decoded it.

    Attributes:
        size: width and height in pixels of the full-size image.

    Raises BadImage if `content` is not an image.
    """

    def __init__(self, content: bytes, path: str, *, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> None:
        self.content, self.path, self.convert = content, path, convert
        if not content:
            raise BadImage(path, "the file is empty")
        self.image: Image.Image | None = None  # the image that PIL opened; None if `decode_jpeg` decodes it
        size = jpeg_size(content) if convert is to_rgb else None
        if size is None:
            self.image = self.open_with_pil()
            size = self.image.size
        self.size = size

    def open_with_pil(self) -> Image.Image:
        """Open the file with PIL, without decoding it. Raises BadImage if `content` is not an image."""
        try:
            return open_image(self.content)
        # PIL's decoders raise nearly any exception type for damaged files, here and in `decode`.
        except Exception as error:
            raise BadImage(self.path, str(error) or type(error).__name__) from error

    def decode(self, divisor: int = 1) -> Image.Image | Pixels:
        """Decode the pixels. This method can be called only once.

        divisor: 1, 2, 4 or 8. If each side of a JPEG has at least `divisor` pixels, the JPEG is decoded at 1/divisor of
            its size, rounded up. For other formats, the divisor has no effect.

        Raises BadImage if the file is damaged or truncated.
        """
        if self.image is None:
            try:
                return decode_jpeg(self.content, self.size, divisor)
            except ValueError:
                # PIL can decode some files that `decode_jpeg` rejects. If PIL rejects the file too, its error names the
                # damage.
                self.image = self.open_with_pil()
        try:
            with self.image as image:
                if divisor > 1:
                    # PIL selects the scale from the requested size. For this size, it selects 1 / `divisor`.
                    image.draft(None, (max(1, image.width // divisor), max(1, image.height // divisor)))
                return self.convert(image)
        except Exception as error:
            raise BadImage(self.path, str(error) or type(error).__name__) from error


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

    Raises ValueError if the JPEG is damaged, or if `divisor` is above 1 and both sides have less than 8 pixels.
    """
    if divisor == 1:
        return Pixels(simplejpeg.decode_jpeg(content, "RGB"))
    if max(size) < 8:
        raise ValueError(f"the image size {size} is too small to select the scale 1/{divisor} by its result's size")
    # libjpeg scales by multiples of 1/8. It selects the smallest scale with which the result has at least this size.
    width, height = (-(-side // divisor) for side in size)
    return Image.fromarray(simplejpeg.decode_jpeg(content, "RGB", min_width=width, min_height=height))


def open_file(path: str, *, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Encoded:
    """Open an image file; see `Encoded`. All datasets of image files use this function.

    Raises BadImage if the file cannot be read, is not a regular file, has more than `MAX_FILE_BYTES`, or is not an
    image.
    """
    try:
        content = read_regular(path, most=MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise BadImage(path, getattr(error, "strerror", None) or str(error)) from error
    return Encoded(content, path, convert=convert)


def decode(path: str, *, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """Open and decode an image file at full size as a PIL image; see `Encoded`."""
    image = open_file(path, convert=convert).decode()
    return Image.fromarray(image.values) if isinstance(image, Pixels) else image
