from __future__ import annotations

import math

import torch

from sslcli.weights.export.preprocessing import Preprocessing

GIVEN = Preprocessing(image_size=8, resized_side=9, mean=(0.5, 0.25), std=(0.5, 0.125))


def test_images_are_normalized_per_channel() -> None:
    images = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1).expand(3, 2, 4, 4)
    assert torch.equal(GIVEN.normalize(images)[0, :, 0, 0], torch.tensor([1.0, 2.0]))
    assert GIVEN.channels == 2


def test_a_tool_that_divides_by_the_fraction_resizes_to_the_same_side() -> None:
    for size in range(16, 513):
        side = round(size * 8 / 7)
        given = Preprocessing(image_size=size, resized_side=side, mean=(0.0,), std=(1.0,))
        assert math.floor(size / given.crop_fraction) == side


def test_the_file_states_who_normalizes() -> None:
    assert GIVEN.to_plain(is_normalized_by_model=True)["normalization"] == "by the model"
    plain = GIVEN.to_plain(is_normalized_by_model=False)
    assert (plain["normalization"], plain["mean"], plain["resize_shorter_side"]) == ("by the caller", [0.5, 0.25], 9)
    assert GIVEN.is_normalized
    assert not Preprocessing(image_size=8, resized_side=8, mean=(0.0,), std=(1.0,)).is_normalized
