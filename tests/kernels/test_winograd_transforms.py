"""Transforms of Winograd convolutions against their definition in float64 (Lavin & Gray 2015)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.kernels.winograd_transforms import (
    POINTS,
    TILE,
    from_points,
    gradient_points,
    padded_to_tiles,
    tiles,
    to_points,
    whole,
)

# F(4x4, 3x3): input, kernel and output matrices of the paper's appendix.
B_T = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
A_T = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float64
)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("side", "expected"), [(1, 4), (4, 4), (5, 8), (32, 32)])
def test_sides_are_rounded_up_to_tiles(side: int, expected: int) -> None:
    assert whole(side) == expected


def test_tiles_are_counted_by_image_row_and_column() -> None:
    assert tiles(torch.empty(3, 5, 9, 2)) == (3, 2, 3)


def test_padding_has_a_border_and_fills_the_last_tile_with_zeros() -> None:
    maps = torch.ones(1, 5, 4, 2)
    padded = padded_to_tiles(maps, border=1)
    assert padded.shape == (1, 10, 6, 2)
    assert torch.equal(padded[:, 1:6, 1:5], maps)
    assert padded.sum() == maps.sum()


def test_points_of_a_tile_are_the_matrix_product_of_the_paper() -> None:
    maps = drawn(2, 8, 4, 3)
    points = to_points(maps).view(POINTS, POINTS, 2, 2, 1, 3)
    padded = F.pad(maps, (0, 0, 1, 1, 1, 1))
    for image, row in ((0, 0), (1, 1)):
        tile = padded[image, TILE * row : TILE * row + 6, 0:6]  # (6, 6, C)
        expected = torch.einsum("ia,abc,jb->ijc", B_T, tile, B_T)
        torch.testing.assert_close(points[:, :, image, row, 0], expected)


def test_maps_are_the_matrix_product_of_the_paper_cut_to_their_size() -> None:
    points, out = drawn(36, 2, 3), torch.full((1, 7, 3, 3), torch.nan, dtype=torch.float64)
    from_points(points, out)
    grid = points.view(POINTS, POINTS, 2, 3)
    both = torch.stack([torch.einsum("ia,abc,jb->ijc", A_T, grid[:, :, tile], A_T) for tile in range(2)])
    torch.testing.assert_close(out, both.reshape(1, 8, 4, 3)[:, :7, :3])


def test_points_of_a_gradient_are_the_transpose_of_the_interpolation() -> None:
    """<from_points(p), g> = <p, gradient_points(g)>, for sizes that do not fill their tiles as well."""
    for height, width in ((8, 4), (5, 7)):
        gradient = drawn(2, height, width, 3)
        points = drawn(*gradient_points(gradient).shape)
        out = torch.empty_like(gradient)
        from_points(points, out)
        torch.testing.assert_close((out * gradient).sum(), (points * gradient_points(gradient)).sum())
