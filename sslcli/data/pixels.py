"""Decoded images as NumPy arrays. Unlike images of Pillow, they can have any number of 8-bit channels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Pixels:
    """A picture as a NumPy array (H, W, C) uint8. `crop` returns a view of the array.

    If a picture has three channels, Pillow resizes it as a whole. All other pictures are resized channel by channel.
    This is necessary even with four channels, because Pillow would treat the fourth channel as transparency and change
    the colors.
    """

    def __init__(self, values: NDArray[np.uint8]) -> None:
        self.values = values
        self.height, self.width, self.channels = values.shape

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    def crop(self, box: tuple[int, int, int, int]) -> Pixels:
        """Crop the box (left, top, right, bottom). The box must lie inside the picture."""
        left, top, right, bottom = box
        return Pixels(self.values[top:bottom, left:right])

    def resize(
        self,
        size: tuple[int, int],
        resample: Image.Resampling,
        box: tuple[float, float, float, float] | None = None,
    ) -> Image.Image | Pixels:
        """Return the picture, or the box (left, top, right, bottom) of the picture, resized to (width, height)."""
        if self.channels == 3:
            return Image.fromarray(self.values).resize(size, resample, box)
        channels = np.moveaxis(self.values, 2, 0)
        resized = [np.asarray(Image.fromarray(channel).resize(size, resample, box)) for channel in channels]
        return Pixels(np.stack(resized, 2))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype, copy=True) if copy else np.asarray(self.values, dtype)


def as_picture(values: NDArray[np.uint8]) -> Image.Image | Pixels:
    """Return an array (H, W, C) as a PIL image if it has three channels, else as `Pixels`."""
    return Image.fromarray(values) if values.shape[2] == 3 else Pixels(values)
