"""Interfaces (`typing.Protocol`) of opened images, whose size is known, and of decoded pictures.

Views are cropped from decoded pictures.
"""

from __future__ import annotations

from typing import Protocol

from PIL import Image


class Picture(Protocol):
    """Decoded image from which views are cropped: a PIL image, an array (`Pixels`) or several modalities (`Layers`)."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    def crop(self, box: tuple[int, int, int, int], /) -> Picture:
        """Crop the box (left, top, right, bottom)."""

    def resize(self, size: tuple[int, int], resample: Image.Resampling, /) -> Picture:
        """Return the whole picture resized to (width, height)."""


class OpenedImage(Protocol):
    """An image whose size is known and whose pixels are decoded on request, such as `sslcli.data.decode.Encoded`."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the full-size image."""

    def decode(self, divisor: int = 1, /) -> Picture:
        """Decode the image. If its format supports scaled decoding, decode at 1/divisor of the size.

        Raises BadImage if the image is damaged.
        """


class DecodedImage:
    """An opened image that is already decoded. `picture` is the decoded image."""

    def __init__(self, picture: Picture) -> None:
        self.picture, self.size = picture, picture.size

    def decode(self, divisor: int = 1) -> Picture:
        """Return the picture at full size; `divisor` is ignored."""
        return self.picture
