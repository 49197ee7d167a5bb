"""From the bytes of an image file to pixels: whatever is in it becomes RGB, and a JPEG may be decoded smaller."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from sslcli.data.bad_images import BadImage

DIVISORS = (1, 2, 4, 8)


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
        self.path, self.convert = path, convert
        if not content:
            raise BadImage(path, "the file is empty")
        try:
            self.image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError as error:
            raise BadImage(path, "no image format that is known") from error
        # On damaged bytes PIL's decoders raise nearly any type, here and below.
        except Exception as error:
            raise BadImage(path, str(error) or type(error).__name__) from error
        self.size: tuple[int, int] = self.image.size

    def decode(self, divisor: int = 1) -> Image.Image:
        """The pixels, once. A JPEG of at least `divisor` pixels a side comes at 1/divisor of its size, rounded up.

        divisor: 1, 2, 4 or 8; other formats take no notice. Raises BadImage if the file cannot be read whole.
        """
        try:
            with self.image as image:
                if divisor > 1:
                    # PIL takes the largest divisor that leaves at least this size; asked for thus, it is this one.
                    image.draft(None, (max(1, image.width // divisor), max(1, image.height // divisor)))
                return self.convert(image)
        except Exception as error:
            raise BadImage(self.path, str(error) or type(error).__name__) from error


def open_file(path: str, *, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Encoded:
    """An image file; see `Encoded`. Raises BadImage for a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except (OSError, ValueError) as error:
        raise BadImage(path, getattr(error, "strerror", None) or str(error)) from error
    return Encoded(content, path, convert=convert)


def decode(path: str, *, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """The whole image in a file; see `Encoded`."""
    return open_file(path, convert=convert).decode()
