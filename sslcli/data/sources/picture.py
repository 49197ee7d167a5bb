"""An image on its way from its file to the crops: first its size alone, then the pixels that are asked for."""

from __future__ import annotations

from typing import Protocol

from PIL import Image


class Picture(Protocol):
    """Source of crops: a PIL image, or several aligned images (`sslcli.data.sources.parallel`)."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    def crop(self, box: tuple[int, int, int, int], /) -> Picture:
        """The part from left and top to right and bottom."""

    def resize(self, size: tuple[int, int], resample: Image.Resampling, /) -> Picture:
        """All of it at another size."""


class Opened(Protocol):
    """An image of which the size is known; `sslcli.data.decode.Encoded` decodes the rest when it is asked to."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole image."""

    def decode(self, divisor: int = 1, /) -> Picture:
        """The image, at 1/divisor of its size where that saves work. Raises BadImage if it cannot be read."""


class Whole:
    """A picture that is there already."""

    def __init__(self, picture: Picture) -> None:
        self.picture, self.size = picture, picture.size

    def decode(self, divisor: int = 1) -> Picture:
        """The picture, whatever the divisor."""
        return self.picture
