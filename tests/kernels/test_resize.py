"""The compiled resize gives the crops of the torch operations, which other tests compare with torchvision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from platforms import needs_avx2
from sslcli.data.views import augment
from sslcli.kernels import resize

SHAPES = [  # images, channels, height, width, size of the result
    (50, 3, 32, 32, 32),
    (40, 3, 20, 41, 24),
    (30, 1, 96, 64, 32),
    (20, 3, 8, 9, 65),
    (9, 4, 150, 130, 7),
]


def drawn(count: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Bytes, and a box in each image, of one pixel in the first and of all of them in the second."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=generator)
    draws = torch.rand(count, 4, generator=generator)
    down, across = (draws[:, :2] * torch.tensor([height, width])).long().unbind(1)
    high, wide = ((draws[:, 2:] * torch.stack((height - down, width - across), 1)).long() + 1).unbind(1)
    boxes = torch.stack((down, across, high, wide), 1)
    boxes[0, 2:] = 1
    boxes[1] = torch.tensor([0, 0, height, width])
    return images, boxes


@needs_avx2
@pytest.mark.parametrize("interpolation", augment.INTERPOLATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiled_crops_are_those_of_the_operations(
    shape: tuple[int, int, int, int, int], interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    *made_of, size = shape
    images, boxes = drawn(*made_of)
    assert resize.library() is not None, "sslcli has to be installed with a C compiler for its tests"
    compiled = augment.resized_crop(images, boxes, size, interpolation=interpolation)
    monkeypatch.setattr(resize, "library", lambda: None)
    expected = augment.resized_crop(images, boxes, size, interpolation=interpolation)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (9, 12, 30, 41, 24)], ids=str)
def test_bytes_are_the_numbers_rounded(shape: tuple[int, int, int, int, int], cubic: bool) -> None:
    *made_of, size = shape
    images, boxes = drawn(*made_of)
    pictures = images.permute(0, 2, 3, 1).contiguous()
    found = resize.resized_bytes(pictures, boxes, size, cubic=cubic)
    numbers = resize.resized_crops(images, boxes, size, cubic=cubic)
    assert numbers is not None
    assert (found - 255 * numbers).abs().max() < 0.5 + 1e-3


def test_neither_the_threads_nor_the_rest_of_the_batch_change_a_crop() -> None:
    images, boxes = drawn(30, 3, 40, 30)
    whole = augment.resized_crop(images, boxes, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(augment.resized_crop(images[7:9], boxes[7:9], 32), whole[7:9])
    finally:
        torch.set_num_threads(before)


def test_no_image() -> None:
    assert augment.resized_crop(torch.empty(0, 3, 8, 8, dtype=torch.uint8), torch.empty(0, 4).long(), 4).shape[0] == 0
