"""Shapes and bounds of the decoder."""

from __future__ import annotations

import pytest
import torch

from sslcli.nn.decoder import Decoder


@pytest.mark.parametrize("image_size", [8, 28, 32, 48, 64, 96, 100, 224])
def test_any_side_is_decoded_and_every_pixel_depends_on_the_code(image_size: int) -> None:
    torch.manual_seed(0)
    decoder = Decoder(5, image_size=image_size, channels=2, width=16).eval()
    images = decoder(torch.randn(2, 5))
    assert images.shape == (2, 2, image_size, image_size)
    assert images[0].ne(images[1]).all()


def test_widths_are_those_of_the_paper_at_32_pixels() -> None:
    decoder = Decoder(100, image_size=32)
    widths = [block[1].weight.shape[:2] for block in decoder.blocks]
    assert decoder.spread.weight.shape == (512 * 16, 100)
    assert widths == [(256, 512), (128, 256), (64, 128)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"image_size": 4}, "image_size is 4, but .* at least 8"), ({"image_size": 32, "width": 0}, "width is 0")],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(4, **arguments)
