"""Base class of datasets whose images are encoded files, such as JPEG, PNG and TIFF."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sslcli.data.pixel_format import pixel_format
from sslcli.data.sources.base import Source, check_flag
from sslcli.data.sources.records import digest


class EncodedImages(Source):
    """A dataset of encoded images.

    Args:
        scaled_decode: see `Source`.
        channels: number of channels of the images: 1 = gray, 3 = RGB. With another number, each image must have this
            number of bands.
        value_range: mapping of pixel values to 8 bits.
            "auto" (default in the yaml files): 8-bit images are not changed. For non-negative integers of up to 16
            bits, the bit depth is the smallest of 8, 10, 12, 14 and 16 bits that can represent all values of the image.
            The largest value of this bit depth is mapped to 255. For all other values, the percentiles 0.1 and 99.9 of
            the image are mapped to 0 and 255.
            "full" (as in version 0.2): the range of the data type is mapped to 0 to 255.
            A pair (low, high): these two values are mapped to 0 and 255.
        common: the arguments of `Source`. The defaults of `mean` and `std` are 0.5 and 0.25 for each channel.

    Attributes:
        pixel_format: the conversion of decoded files to `channels` channels of 8 bits.
    """

    def __init__(
        self,
        *,
        scaled_decode: bool = True,
        channels: int = 3,
        value_range: str | Sequence[float] = "full",
        **common: Any,
    ) -> None:
        self.pixel_format = pixel_format(channels, value_range)
        self.channels = channels
        super().__init__(**({"mean": (0.5,) * channels, "std": (0.25,) * channels} | common))
        self.scaled_decode = check_flag("scaled_decode", scaled_decode)

    @cached_property
    def version(self) -> str:
        """Version of the images, see `Source.version`. It changes if the format of decoded images changes."""
        identity = self.pixel_format.identity
        return digest((super().version.encode(), identity)) if identity else super().version
