"""Transforms of Winograd convolutions: from tile values to values at points, and from points to tile values.

The tile values are treated as coefficients of a polynomial, and the points are the numbers at which it is evaluated.

Lavin & Gray 2015  https://arxiv.org/abs/1509.09308     F(4x4, 3x3), with the points 0, 1, -1, 2, -2 and infinity

Each transform has two implementations: a compiled C function (pass), and torch operations, which are used if the
compiled function is not available. Both give bit-identical results.

Shapes: n images, H x W maps, C or O channels, T tiles. A tile has 4 x 4 values. In two dimensions, there are 6 x 6 = 36
points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.kernels.winograd_passes import transform

TILE, POINTS = 4, 6
Rows = Sequence[Tensor] | Tensor  # the first dimension counts tile values or points


def whole(side: int) -> int:
    """Round `side` up to a multiple of the side of a tile (4)."""
    return -(-side // TILE) * TILE


def tiles(maps: Tensor) -> tuple[int, int, int]:
    """Return (number of images, tiles per column, tiles per row) for maps (n, H, W, C) and tiles of 4 x 4 values."""
    return len(maps), whole(maps.shape[1]) // TILE, whole(maps.shape[2]) // TILE


def to_points(maps: Tensor) -> Tensor:
    """Evaluate the polynomials of T tiles at the 36 points of the Winograd algorithm: (n, H, W, C) -> (36, T, C).

    A tile has 4 x 4 values of a map. With a border of one value on each side, there are 6 x 6 values. They are the
    coefficients of the polynomial of the tile.
    """
    (n, high, wide), channels = tiles(maps), maps.shape[3]
    points = maps.new_empty(POINTS, POINTS, n, high, wide, channels)
    if not transform("to_points", maps, points, maps):
        padded = padded_to_tiles(maps, border=1)
        rows = maps.new_empty(POINTS, n, high * TILE + 2, wide, channels)
        evaluate([padded[:, :, j : j + wide * TILE - 3 : TILE] for j in range(POINTS)], rows)
        evaluate([rows[:, :, i : i + high * TILE - 3 : TILE] for i in range(POINTS)], points)
    return points.view(POINTS**2, -1, channels)


def from_points(points: Tensor, out: Tensor) -> None:
    """Compute maps from values at the 36 points of the Winograd algorithm, for each of T tiles.

    `points` (36, T, O) contains the values at the points. The maps (n, H, W, O) are written to `out`. Each tile gives
    4 x 4 values of the maps.
    """
    if transform("from_points", points, out, out):
        return
    (n, high, wide), channels = tiles(out), out.shape[3]
    rows = points.new_empty(TILE, POINTS, n, high, wide, channels)
    interpolate(points.view(POINTS, POINTS, n, high, wide, channels), rows)
    maps = points.new_empty(n, high, TILE, wide, TILE, channels)
    interpolate([rows[:, j] for j in range(POINTS)], maps.permute(4, 2, 0, 1, 3, 5))
    out.copy_(maps.view(n, high * TILE, wide * TILE, channels)[:, : out.shape[1], : out.shape[2]])


def gradient_points(gradient: Tensor) -> Tensor:
    """Apply the transpose of `from_points` to the gradient of a convolution's output: (n, H, W, O) -> (36, T, O).

    n is the number of images, O the number of output channels, and T the number of tiles of 4 x 4 values. 36 is the
    number of points at which the Winograd algorithm evaluates the polynomials of a tile.
    """
    (n, high, wide), channels = tiles(gradient), gradient.shape[3]
    points = gradient.new_empty(POINTS, POINTS, n, high, wide, channels)
    if not transform("gradient_points", gradient, points, gradient):
        padded = padded_to_tiles(gradient, border=0)
        rows = gradient.new_empty(POINTS, TILE, n, high, wide, channels)
        spread(padded.view(n, high, TILE, wide, TILE, channels).permute(4, 2, 0, 1, 3, 5), rows)
        spread([rows[:, i] for i in range(TILE)], points)
    return points.view(POINTS**2, -1, channels)


def padded_to_tiles(maps: Tensor, *, border: int) -> Tensor:
    """Zero-pad maps to whole tiles of 4 x 4 values, and add a border of zeros: (n, H, W, C) -> (n, H', W', C).

    `border` is the width of the border on each side, in values.
    """
    _, height, width, _ = maps.shape
    right, below = border + whole(width) - width, border + whole(height) - height
    return F.pad(maps, (0, 0, border, right, border, below)).contiguous()


def evaluate(d: Rows, out: Rows) -> None:
    """Evaluate a polynomial at the six points of the Winograd algorithm. Its coefficients are six tile values.

    This is the product with the matrix B^T of the paper (arXiv:1509.09308) for F(4x4, 3x3). The first dimension of `d`
    (input) and `out` (output) has size 6.
    """
    even, odd = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(even, d[2], out=out[0]).add_(d[0], alpha=4)
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.sub(d[5], d[3], out=out[5]).sub_(odd, alpha=4)


def interpolate(m: Rows, out: Rows) -> None:
    """Compute four outputs of a convolution from the values at the six points of the Winograd algorithm.

    This is the product with the matrix A^T of the paper (arXiv:1509.09308) for F(4x4, 3x3). The first dimension of `m`
    (input) has size 6, and the first dimension of `out` (output) has size 4.
    """
    even, odd = m[1] + m[2], m[1] - m[2]
    far_even, far_odd = m[3] + m[4], m[3] - m[4]
    torch.add(odd, far_odd, alpha=2, out=out[1])
    torch.add(even, far_even, alpha=4, out=out[2])
    torch.add(even.add_(far_even), m[0], out=out[0])
    torch.add(odd.add_(far_odd, alpha=8), m[5], out=out[3])


def spread(y: Rows, out: Rows) -> None:
    """Map four values to six values with the matrix A of the paper (arXiv:1509.09308), the transpose of `interpolate`.

    The first dimension of `y` (input) has size 4, and the first dimension of `out` (output) has size 6.
    """
    out[0].copy_(y[0])
    out[5].copy_(y[3])
    even, odd = y[0] + y[2], y[1] + y[3]
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.add(y[0], y[2], alpha=4, out=even)
    torch.add(y[1], y[3], alpha=4, out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
