"""3x3 convolutions of the CPU in float32 with a quarter of the multiplications.

Lavin & Gray 2015  https://arxiv.org/abs/1509.09308     F(4x4, 3x3), with the points 0, 1, -1, 2, -2 and infinity

N images, C and O channels in and out, H x W maps; T tiles of 4 x 4 results, each made of 6 x 6 numbers.
A tile's polynomial is evaluated at 6 x 6 points, where a convolution is a product for each point: 36 products of
(T, C) with (C, O) in place of one of (16 T, 9 C) with (9 C, O). The gradient of the images is a convolution too; that
of the weight comes from the same products, transposed.

torch asks oneDNN for direct convolutions, whose gradient of a weight in channels-last memory reaches half the speed of
the other passes on processors with AVX2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

TILE, POINTS = 4, 6
LEAST_CHANNELS = 64  # with fewer, the transforms cost more than the products save
LEAST_TILES = 32  # with fewer, transforming the weight does
MOST_PADDING = 1.4  # numbers in whole tiles over numbers in the maps
CHUNK_BYTES = 4 * 2**20  # of the points of some images, for each thread: what stays in its share of the caches
CAPABLE = ("AVX2", "AVX512")  # measured with the former; the latter multiplies matrices as fast as it convolves

# The three numbers of a kernel, evaluated at each point: the paper's G.
KERNEL_AT_POINTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
Rows = Sequence[Tensor] | Tensor  # a dimension of numbers or points is the first


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 that takes the fast path where it is one: the CPU, float32, maps large enough."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        if not pays(input, self.weight):
            return super().forward(input)
        out: Tensor = Convolution.apply(input, self.weight)
        return out if self.bias is None else out + self.bias.view(1, -1, 1, 1)


def use_winograd(net: nn.Module) -> None:
    """Let the convolutions of `net` that can be computed so be, in place; names and parameters stay."""
    if torch.backends.cpu.get_cpu_capability() not in CAPABLE:
        return
    for module in net.modules():
        if type(module) is nn.Conv2d and fits(module):
            module.__class__ = WinogradConv2d


def fits(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one of 3x3, stride 1 and padding 1 with channels enough."""
    return (
        (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (conv.groups, conv.padding_mode) == (1, "zeros")
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
    )


def pays(images: Tensor, weight: Tensor) -> bool:
    """Whether these maps, on this device and in this format, are convolved faster so."""
    if images.device.type != "cpu" or images.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if images.dim() != 4 or torch.is_autocast_enabled("cpu") or watched():
        return False
    height, width = images.shape[2:]
    covered = whole(height) * whole(width)
    return len(images) * covered >= LEAST_TILES * TILE**2 and covered <= MOST_PADDING * height * width


def watched() -> bool:
    """Whether a compiler or exporter follows the operations, which has convolutions of its own."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


class Convolution(torch.autograd.Function):
    """(N, C, H, W), (O, C, 3, 3) -> (N, O, H, W), with padding 1."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return convolve(images, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        images, weight = ctx.saved_tensors
        (gradient,) = gradients
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, so torch must see how it is made
            return (
                conv2d_input(images.shape, weight, gradient, padding=1),  # type: ignore[no-untyped-call]
                conv2d_weight(images, weight.shape, gradient, padding=1),  # type: ignore[no-untyped-call]
            )
        images_wanted, weight_wanted = ctx.needs_input_grad
        return (
            convolve(gradient, weight.flip(2, 3).transpose(0, 1)) if images_wanted else None,
            weight_gradient(images, gradient) if weight_wanted else None,
        )


def convolve(images: Tensor, weight: Tensor) -> Tensor:
    """The convolution of (N, C, H, W) with (O, C, 3, 3), padding 1, in channels-last memory."""
    maps = channels_last(images)
    n, height, width, _ = maps.shape
    kernels = kernel_points(weight)
    out = maps.new_empty(n, whole(height), whole(width), len(weight))
    for part in chunks(maps, kernels):
        from_points(torch.bmm(to_points(maps[part]), kernels), out[part])
    return out[:, :height, :width].permute(0, 3, 1, 2)


def weight_gradient(images: Tensor, gradient: Tensor) -> Tensor:
    """Of the weight (O, C, 3, 3), given the (N, C, H, W) and the gradient (N, O, H, W) of its convolution."""
    maps, gradients = channels_last(images), channels_last(gradient)
    channels, out_channels = maps.shape[3], gradients.shape[3]
    sums = maps.new_zeros(POINTS**2, out_channels, channels)
    for part in chunks(maps, sums):
        sums.baddbmm_(gradient_points(gradients[part]).transpose(1, 2), to_points(maps[part]))
    kernels = evaluation(maps).t() @ sums.flatten(1)
    return kernels.view(3, 3, out_channels, channels).permute(2, 3, 0, 1)


def channels_last(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C), contiguous."""
    return images.permute(0, 2, 3, 1).contiguous()


def whole(side: int) -> int:
    """The side of whole tiles that holds so many numbers."""
    return -(-side // TILE) * TILE


def chunks(maps: Tensor, kernels: Tensor) -> list[slice]:
    """Runs of images whose points stay in the caches, yet are no fewer than the kernels' that each run reads."""
    n, height, width, channels = maps.shape
    image_bytes = 4 * POINTS**2 * channels * (whole(height) // TILE) * (whole(width) // TILE)
    size = max(CHUNK_BYTES * torch.get_num_threads(), 4 * kernels.numel()) // image_bytes + 1
    return [slice(start, start + size) for start in range(0, n, size)]


def evaluation(like: Tensor) -> Tensor:
    """(36, 9): a kernel of 3 x 3 numbers at the 6 x 6 points."""
    rows = torch.tensor(KERNEL_AT_POINTS, dtype=torch.float64)
    return torch.kron(rows, rows).to(like)


def kernel_points(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (36, C, O), a view of what is made in the weight's own order in memory."""
    if weight.stride(0) < weight.stride(1):  # for the gradient of the images the channels have changed places
        return torch.matmul(evaluation(weight), weight.permute(1, 2, 3, 0).flatten(1, 2)).transpose(0, 1)
    return torch.matmul(evaluation(weight), weight.permute(0, 2, 3, 1).flatten(1, 2)).permute(1, 2, 0)


def to_points(maps: Tensor) -> Tensor:
    """(n, H, W, C) -> (36, T, C): each tile and the numbers around it, evaluated at the points."""
    n, height, width, channels = maps.shape
    high, wide = whole(height), whole(width)
    padded = F.pad(maps, (0, 0, 1, wide - width + 1, 1, high - height + 1))
    rows = maps.new_empty(POINTS, n, high + 2, wide // TILE, channels)
    evaluate([padded[:, :, j : j + wide - 3 : TILE] for j in range(POINTS)], rows)
    points = maps.new_empty(POINTS, POINTS, n, high // TILE, wide // TILE, channels)
    evaluate([rows[:, :, i : i + high - 3 : TILE] for i in range(POINTS)], points)
    return points.view(POINTS**2, -1, channels)


def from_points(points: Tensor, out: Tensor) -> None:
    """(36, T, O) -> (n, H, W, O), whole tiles."""
    n, height, width, channels = out.shape
    tiles = (n, height // TILE, width // TILE)
    rows = points.new_empty(TILE, POINTS, *tiles, channels)
    interpolate(points.view(POINTS, POINTS, *tiles, channels), rows)
    into = out.view(n, height // TILE, TILE, width // TILE, TILE, channels).permute(4, 2, 0, 1, 3, 5)
    interpolate([rows[:, j] for j in range(POINTS)], into)


def gradient_points(gradient: Tensor) -> Tensor:
    """(n, H, W, O) -> (36, T, O), the transpose of `from_points`."""
    n, height, width, channels = gradient.shape
    high, wide = whole(height), whole(width)
    if (high, wide) != (height, width):
        gradient = F.pad(gradient, (0, 0, 0, wide - width, 0, high - height))
    tiles = (n, high // TILE, wide // TILE)
    given = gradient.view(n, tiles[1], TILE, tiles[2], TILE, channels).permute(4, 2, 0, 1, 3, 5)
    rows = gradient.new_empty(POINTS, TILE, *tiles, channels)
    spread(given, rows)
    points = gradient.new_empty(POINTS, POINTS, *tiles, channels)
    spread([rows[:, i] for i in range(TILE)], points)
    return points.view(POINTS**2, -1, channels)


def evaluate(d: Rows, out: Rows) -> None:
    """Six numbers -> their values at the six points: the matrix B^T of the paper's equation for F(4x4, 3x3)."""
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
    """Values at the six points -> the four numbers of the result: the paper's A^T."""
    even, odd = m[1] + m[2], m[1] - m[2]
    far_even, far_odd = m[3] + m[4], m[3] - m[4]
    torch.add(odd, far_odd, alpha=2, out=out[1])
    torch.add(even, far_even, alpha=4, out=out[2])
    torch.add(even.add_(far_even), m[0], out=out[0])
    torch.add(odd.add_(far_odd, alpha=8), m[5], out=out[3])


def spread(y: Rows, out: Rows) -> None:
    """Four numbers -> six, the transpose of `interpolate`."""
    out[0].copy_(y[0])
    out[5].copy_(y[3])
    even, odd = y[0] + y[2], y[1] + y[3]
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.add(y[0], y[2], alpha=4, out=even)
    torch.add(y[1], y[3], alpha=4, out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
