"""Format of decoded images: the number of channels and the mapping of pixel values to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sslcli.data.bands import Samples, has_lost_bands, has_lost_precision, is_deep, samples_of
from sslcli.data.pixels import Pixels, as_picture
from sslcli.data.value_range import ValueRange, parse_value_range, to_8_bits
from sslcli.errors import check_integer


@dataclass(frozen=True)
class PixelFormat:
    """Conversion of decoded files to images of 8 bits with a fixed number of channels.

    - With one channel, color images become gray with the luma of ITU-R 601, as in Pillow.
    - With three channels, gray images become RGB.
    - With one or three channels, transparent images are composited over white.
    - With another number of channels, the image must have this number of bands. Transparency counts as a band.

    Attributes:
        channels: number of channels, at least 1.
        value_range: the mapping of pixel values to 8 bits, see `to_8_bits`.
    """

    channels: int = 3
    value_range: ValueRange = "auto"

    @property
    def is_color(self) -> bool:
        """True if `channels` is 1 or 3: images become gray or RGB. If False, the bands of an image are its channels."""
        return self.channels in (1, 3)

    @property
    def keeps_8_bits(self) -> bool:
        """Whether 8-bit values are kept unchanged. If False, they are mapped like values of more than 8 bits."""
        return isinstance(self.value_range, str)

    @property
    def identity(self) -> bytes:
        """Bytes that identify the format in cache keys. They are empty for `LEGACY`, the only format of version 0.2."""
        return b"" if self == LEGACY else f"{self.channels} {self.value_range}".encode()

    def needs_samples(self, image: Image.Image, content: bytes) -> bool:
        """Return whether `sslcli.data.bands` must decode an image, because Pillow would lose needed bands or bits.

        image: the file, opened by Pillow.
        content: the bytes of the file.
        """
        if has_lost_bands(image, only_colors=self.is_color):
            return True
        return has_lost_precision(image, content) and (not self.is_color or self.value_range != "full")

    def convert(self, image: Image.Image) -> Image.Image | Pixels:
        """Convert an image that Pillow opened. Raises ValueError if it has the wrong number of bands."""
        is_plain = self.value_range == "full" or (self.keeps_8_bits and not is_deep(image))
        if self.is_color and is_plain:
            return self.from_rgb(to_rgb(image, "full"))
        return self.convert_samples(samples_of(image))

    def from_rgb(self, image: Image.Image) -> Image.Image | Pixels:
        """Convert an RGB or gray image of 8 bits to `channels` channels, which must be 1 or 3."""
        return image.convert("RGB") if self.channels == 3 else Pixels(np.asarray(image.convert("L"))[:, :, None])

    def convert_samples(self, samples: Samples) -> Image.Image | Pixels:
        """Map pixel values to 8 bits, and return an image with `channels` channels.

        Raises ValueError if the number of bands is wrong.
        """
        count = samples.values.shape[2]
        if not self.is_color:
            if count != self.channels:
                raise _wrong_bands(count, self.channels)
            return as_picture(to_8_bits(samples.values, self.value_range, nodata=samples.nodata))
        if samples.num_colors == 0:
            raise _wrong_bands(count, self.channels)
        colors = to_8_bits(samples.values[:, :, : samples.num_colors], self.value_range, nodata=samples.nodata)
        image = Image.fromarray(colors if samples.num_colors == 3 else colors[:, :, 0])
        if samples.alpha is None:
            return self.from_rgb(image)
        image = image.convert("RGB")
        image.putalpha(Image.fromarray(_opacity(samples)))
        return self.from_rgb(to_rgb(image))


LEGACY = PixelFormat(3, "full")  # RGB images as in version 0.2


def pixel_format(channels: int, value_range: str | Sequence[float]) -> PixelFormat:
    """Return the format that `dataset.channels` and `dataset.value_range` describe.

    Raises ValueError if a value is not valid.
    """
    check_integer("dataset.channels", channels, minimum=1, hint="; 1 is gray, 3 is RGB")
    return PixelFormat(channels, parse_value_range(value_range))


def to_rgb(image: Image.Image, value_range: ValueRange = "auto") -> Image.Image:
    """Convert a PIL image to RGB. Values of more than 8 bits are mapped with `value_range`, see `to_8_bits`.

    Raises ValueError if the mode cannot be converted to RGB.
    """
    if is_deep(image):
        # "full" maps the values that Pillow returns, as in version 0.2.
        samples = Samples(np.asarray(image)[:, :, None], 1) if value_range == "full" else samples_of(image)
        return Image.fromarray(to_8_bits(samples.values, value_range, nodata=samples.nodata)[:, :, 0]).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _opacity(samples: Samples) -> NDArray[np.uint8]:
    """Return the band with the transparency, in 8 bits: 0 is transparent."""
    values = samples.values[:, :, samples.alpha]
    most = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    opacity: NDArray[np.uint8] = np.rint((values / most).clip(0, 1) * 255).astype(np.uint8)
    return opacity


def _wrong_bands(count: int, channels: int) -> ValueError:
    bands = f"{count} band{'s' * (count != 1)}"
    remedy = f"dataset.channels={count} reads all bands"
    if count == 1:
        remedy += "; of a TIFF with several pages only the first is read, so store all bands in one page"
    return ValueError(f"the image has {bands}, but dataset.channels is {channels} ({remedy})")
