from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sslcli.report.pictures import grid, load, save


def test_a_grid_has_a_tile_an_image_and_a_white_gap_behind_and_below_each() -> None:
    rows = [torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)]
    picture = grid(rows, gap=2, smallest=8)
    assert picture.shape == (3, 2 * (8 + 2), 3 * (8 + 2))
    for row in range(2):
        for column in range(3):
            top, left = 10 * row, 10 * column
            torch.testing.assert_close(picture[:, top : top + 8, left : left + 8], rows[row][column])
            assert (picture[:, top + 8 : top + 10, left : left + 10] == 1).all()
            assert (picture[:, top : top + 10, left + 8 : left + 10] == 1).all()


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    image = torch.rand(1, 3, 4, 4)
    picture = grid([image], gap=0)
    assert picture.shape == (3, 64, 64)
    torch.testing.assert_close(picture, image[0].repeat_interleave(16, 1).repeat_interleave(16, 2))


def test_rows_of_different_sizes_are_drawn_at_the_largest() -> None:
    large, small = torch.rand(2, 3, 96, 96), torch.rand(2, 3, 48, 48)
    picture = grid([large, small], gap=0)
    assert picture.shape == (3, 192, 192)
    torch.testing.assert_close(picture[:, :96, :96], large[0])
    torch.testing.assert_close(picture[:, 96:, :96], small[0].repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize("channels", [1, 2])
def test_of_one_or_two_channels_the_first_is_gray(channels: int) -> None:
    image = torch.rand(1, channels, 64, 64)
    torch.testing.assert_close(grid([image], gap=0), image[0, :1].expand(3, -1, -1))


def test_of_more_than_three_channels_the_first_three_are_color() -> None:
    image = torch.rand(1, 5, 64, 64)
    torch.testing.assert_close(grid([image], gap=0), image[0, :3])


def test_half_precision_images_are_drawn_in_float32() -> None:
    assert grid([torch.rand(1, 3, 8, 8).bfloat16()]).dtype == torch.float32


def test_a_saved_picture_loads_as_it_was(tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (3, 5, 7)) / 255
    save(picture, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (7, 5))
    torch.testing.assert_close(load(tmp_path / "picture.png"), picture)


def test_a_gray_file_loads_with_three_channels(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 51).save(tmp_path / "gray.png")
    torch.testing.assert_close(load(tmp_path / "gray.png"), torch.full((3, 2, 2), 0.2))
