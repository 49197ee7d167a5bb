"""Pictures with any number of channels are cropped and resized as Pillow does with each channel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sslcli.data.pixels import Pixels, as_picture

CHANNELS = [1, 2, 3, 4, 5, 12]


def noise(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 41, channels), np.uint8)


@pytest.mark.parametrize("box", [None, (2.5, 1.0, 30.25, 29.0)])
@pytest.mark.parametrize("channels", CHANNELS)
def test_each_channel_is_resized_alone(channels: int, box: tuple[float, float, float, float] | None) -> None:
    values = noise(channels)
    found = np.asarray(Pixels(values).resize((13, 50), Image.Resampling.BICUBIC, box))
    assert found.shape == (50, 13, channels)
    for channel in range(channels):
        wanted = Image.fromarray(values[..., channel]).resize((13, 50), Image.Resampling.BICUBIC, box)
        assert np.array_equal(found[..., channel], wanted)


@pytest.mark.parametrize("channels", CHANNELS)
def test_crops_are_parts_of_the_array(channels: int) -> None:
    values = noise(channels)
    part = Pixels(values).crop((3, 5, 20, 25))
    assert (part.size, part.width, part.height) == ((17, 20), 17, 20)
    assert np.array_equal(part, values[5:25, 3:20])


@pytest.mark.parametrize("channels", CHANNELS)
def test_only_three_channels_become_a_pil_image(channels: int) -> None:
    values = noise(channels)
    picture = as_picture(values)
    assert isinstance(picture, Image.Image) == (channels == 3)
    assert np.array_equal(picture, values)
    assert picture.size == (41, 30)
