"""From the bytes of an image file to pixels: whatever is in it becomes RGB, and a JPEG may be decoded smaller.

Common JPEGs are decoded by simplejpeg, which makes the pixels that PIL makes in three quarters of the time, small ones
in a sixth of it. PIL decodes everything else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sslcli.data.bad_images import BadImage
from sslcli.system.regular_files import read_regular

DIVISORS = (1, 2, 4, 8)
LARGEST = 512 * 10**6  # bytes of an image file; the largest photographs have a tenth of it


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB; see `Encoded`. Raises ValueError for a mode that has no conversion."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.nan_to_num(np.asarray(image, np.float64))
        low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
        if values.min() < low or values.max() > high:
            low, high = values.min(), values.max()
        gray = (values - low) / max(high - low, np.finfo(float).tiny) * 255
        return Image.fromarray(np.rint(gray).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


class Pixels:
    """A picture as (H, W, 3) uint8, of which a crop is no copy; what is resized becomes an image of PIL."""

    def __init__(self, values: NDArray[np.uint8]) -> None:
        self.values = values
        self.height, self.width = values.shape[:2]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    def crop(self, box: tuple[int, int, int, int]) -> Pixels:
        """The part from left and top to right and bottom, inside of the picture."""
        left, top, right, bottom = box
        return Pixels(self.values[top:bottom, left:right])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """All of it at another size."""
        return Image.fromarray(self.values).resize(size, resample)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype, copy=True) if copy else np.asarray(self.values, dtype)


class Encoded:
    """An image file of which the header is read: its size is known, its pixels are not yet.

    Transparency is laid over white. 16-bit gray is scaled to 8 bits, not clipped; floats in [0, 1] likewise, and wider
    integers and floats are stretched from their least to their greatest value. Of several frames the first counts. A
    JPEG's EXIF orientation is ignored, as in the usual readers of ImageNet.

    Args:
        content: the bytes of the file.
        path: for messages.
        convert: what is made of the image that PIL decodes.

    Attributes:
        size: width and height in pixels of the whole image.

    Raises BadImage for what is no image.
    """

    def __init__(self, content: bytes, path: str, *, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> None:
        self.content, self.path, self.convert = content, path, convert
        if not content:
            raise BadImage(path, "the file is empty")
        self.image: Image.Image | None = None  # in the hands of PIL, unless `decode_jpeg` takes it
        size = jpeg_size(content) if convert is to_rgb else None
        if size is None:
            self.image = self.opened()
            size = self.image.size
        self.size = size

    def opened(self) -> Image.Image:
        """The file in the hands of PIL."""
        try:
            return Image.open(io.BytesIO(self.content))
        except UnidentifiedImageError as error:
            raise BadImage(self.path, "no image format that is known") from error
        # On damaged bytes PIL's decoders raise nearly any type, here and below.
        except Exception as error:
            raise BadImage(self.path, str(error) or type(error).__name__) from error

    def decode(self, divisor: int = 1) -> Image.Image | Pixels:
        """The pixels, once. A JPEG of at least `divisor` pixels a side comes at 1/divisor of its size, rounded up.

        divisor: 1, 2, 4 or 8; other formats take no notice. Raises BadImage if the file cannot be read whole.
        """
        if self.image is None:
            try:
                return decode_jpeg(self.content, self.size, divisor)
            except ValueError:
                # PIL reads some files that libjpeg warns of, and tells what is wrong with the others.
                self.image = self.opened()
        try:
            with self.image as image:
                if divisor > 1:
                    # PIL takes the largest divisor that leaves at least this size; asked for thus, it is this one.
                    image.draft(None, (max(1, image.width // divisor), max(1, image.height // divisor)))
                return self.convert(image)
        except Exception as error:
            raise BadImage(self.path, str(error) or type(error).__name__) from error


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that `decode_jpeg` takes: YCbCr or gray, and no larger than PIL allows; else None."""
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    common = colors in ("YCbCr", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
    return (width, height) if common else None


def decode_jpeg(content: bytes, size: tuple[int, int], divisor: int) -> Image.Image | Pixels:
    """A JPEG of `size` (width, height) as RGB at 1/divisor of it. Raises ValueError for any damage."""
    if divisor == 1:
        return Pixels(simplejpeg.decode_jpeg(content, "RGB"))
    if max(size) < 8:
        raise ValueError(f"several shares of {size} have the size of 1/{divisor}")
    # The least share, of the eighths that it knows, which leaves at least this size.
    width, height = (-(-side // divisor) for side in size)
    return Image.fromarray(simplejpeg.decode_jpeg(content, "RGB", min_width=width, min_height=height))


def open_file(path: str, *, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Encoded:
    """An image file; see `Encoded`. The only place where a set opens one.

    Raises BadImage for a file that cannot be read, is no regular file, or is larger than `LARGEST`.
    """
    try:
        content = read_regular(path, most=LARGEST)
    except (OSError, ValueError) as error:
        raise BadImage(path, getattr(error, "strerror", None) or str(error)) from error
    return Encoded(content, path, convert=convert)


def decode(path: str, *, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """The whole image in a file as an image of PIL; see `Encoded`."""
    image = open_file(path, convert=convert).decode()
    return Image.fromarray(image.values) if isinstance(image, Pixels) else image
