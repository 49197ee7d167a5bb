"""Winograd convolutions (3x3) on the CPU in float32.

Lavin & Gray 2015  https://arxiv.org/abs/1509.09308     F(4x4, 3x3), with the points 0, 1, -1, 2, -2 and infinity

A Winograd convolution needs a quarter of the multiplications of a direct convolution.

Shapes: N images, C input channels, O output channels, feature maps of H x W, T tiles. A tile has 4 x 4 outputs, which
depend on 6 x 6 inputs. The inputs of a tile and the kernel are treated as polynomials and evaluated at 6 x 6 points.
The convolution then is a separate matrix product at each point: 36 products of (T, C) with (C, O). A direct convolution
computes one product of (16 T, 9 C) with (9 C, O). The gradient with respect to the images is also a convolution. The
gradient with respect to the weight consists of 36 products of (O, T) with (T, C).

There are two implementations. The C code in `winograd_passes.c` processes a few tiles at a time. The values of these
tiles then stay in the cache of a core. For wide layers, the C code would have to read the kernels repeatedly.
Therefore, the implementation in torch operations is used for wide layers. If sslcli was installed without a compiler,
the torch operations are used for all layers.

Without this module, torch uses the direct convolutions of oneDNN. On CPUs with AVX2, oneDNN computes the weight
gradient in channels-last memory format at only half the speed of the forward pass and of the input gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from sslcli.kernels import library, winograd_passes
from sslcli.kernels.winograd_transforms import POINTS, TILE, from_points, gradient_points, tiles, to_points, whole

LEAST_CHANNELS = 64  # with fewer channels, the transforms take more time than the products save
LEAST_TILES = 32  # with fewer tiles, the transform of the weight takes more time than the products save
MOST_PADDING = 1.4  # maximum of (values in padded tiles) / (values in the maps)
CHUNK_BYTES = 4 * 2**20  # bytes per thread for the values of a chunk of images at the points; fit into the caches

# Matrix that evaluates the three kernel values at each point: G in the paper.
KERNEL_AT_POINTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


class WinogradConv2d(nn.Conv2d):
    """3x3 convolution with stride 1 that uses the Winograd algorithm if it is faster than torch's convolution.

    It is faster on the CPU, in float32, if the feature maps of a batch have enough tiles of 4 x 4 values, see `pays`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution: (N, C, H, W) -> (N, O, H, W)."""
        if not pays(input, self.weight):
            return super().forward(input)
        out: Tensor = Convolution.apply(input, self.weight)
        return out if self.bias is None else out + self.bias.view(1, -1, 1, 1)


def use_winograd(net: nn.Module) -> None:
    """Convert the convolutions of `net` that support the Winograd algorithm to `WinogradConv2d`, in place.

    These are the convolutions for which `fits` is True. Names and parameters do not change. On a CPU without AVX2,
    nothing is converted.
    """
    if torch.backends.cpu.get_cpu_capability() not in library.CAPABLE:
        return
    for module in net.modules():
        if type(module) is nn.Conv2d and fits(module):
            module.__class__ = WinogradConv2d


def fits(conv: nn.Conv2d) -> bool:
    """Return True if a convolution can be replaced by `WinogradConv2d`.

    The kernel must be 3x3, with stride 1, zero padding of 1, no dilation and no groups. The numbers of input and output
    channels must be at least LEAST_CHANNELS.
    """
    return (
        (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (conv.groups, conv.padding_mode) == (1, "zeros")
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
    )


def pays(images: Tensor, weight: Tensor) -> bool:
    """Return True if a Winograd convolution is faster than torch's convolution.

    This depends on the shape, device and dtype of `images` (N, C, H, W) and on the dtype of `weight` (O, C, 3, 3). A
    tile is a block of 4 x 4 values of a feature map. The batch must have at least LEAST_TILES tiles, and the padding to
    whole tiles must not be too large (MOST_PADDING).
    """
    if images.device.type != "cpu" or images.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if images.dim() != 4 or torch.is_autocast_enabled("cpu") or watched():
        return False
    height, width = images.shape[2:]
    covered = whole(height) * whole(width)
    return len(images) * covered >= LEAST_TILES * TILE**2 and covered <= MOST_PADDING * height * width


def watched() -> bool:
    """Return True if torch.compile or an exporter is tracing the network. Traced networks use torch's convolutions."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


class Convolution(torch.autograd.Function):
    """Autograd function of the Winograd convolution with padding 1.

    Shapes: images (N, C, H, W), weight (O, C, 3, 3) -> (N, O, H, W).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        return convolve(images, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        images, weight = ctx.saved_tensors
        (gradient,) = gradients
        if torch.is_grad_enabled():  # double backward: use differentiable torch operations
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
    """Return the Winograd convolution of images (N, C, H, W) with a weight (O, C, 3, 3), with padding 1.

    The result is (N, O, H, W) in channels-last memory format.
    """
    maps = channels_last(images)
    kernels = kernel_points(weight)
    at_once = winograd_passes.convolve(maps, kernels)
    if at_once is not None:
        return at_once.permute(0, 3, 1, 2)
    out = maps.new_empty(*maps.shape[:3], len(weight))
    for part in chunks(maps, kernels):
        from_points(torch.bmm(to_points(maps[part]), kernels), out[part])
    return out.permute(0, 3, 1, 2)


def weight_gradient(images: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the loss with respect to the weight (O, C, 3, 3) of a Winograd convolution.

    `images` (N, C, H, W) are the inputs of the convolution. `gradient` (N, O, H, W) is the gradient of its outputs.
    """
    maps, gradients = channels_last(images), channels_last(gradient)
    channels, out_channels = maps.shape[3], gradients.shape[3]
    sums = winograd_passes.weight_sums(maps, gradients)
    if sums is None:
        sums = maps.new_zeros(POINTS**2, out_channels, channels)
        for part in chunks(maps, sums):
            sums.baddbmm_(gradient_points(gradients[part]).transpose(1, 2), to_points(maps[part]))
    kernels = evaluation(maps).t() @ sums.flatten(1)
    return kernels.view(3, 3, out_channels, channels).permute(2, 3, 0, 1)


def channels_last(images: Tensor) -> Tensor:
    """Permute (N, C, H, W) to contiguous (N, H, W, C)."""
    return images.permute(0, 2, 3, 1).contiguous()


def chunks(maps: Tensor, kernels: Tensor) -> list[slice]:
    """Divide the images into slices that are processed one after the other.

    `maps` (N, H, W, C) are the images. `kernels` (36, C, O) are the values of the kernels at the 36 points of the
    Winograd algorithm. The values of a slice at these points need about `CHUNK_BYTES` per thread and therefore fit into
    the CPU caches. All kernels are read once per slice. To keep this cost small, a slice has at least as many values
    as the kernels, even if these values then exceed `CHUNK_BYTES`.
    """
    n, high, wide = tiles(maps)
    image_bytes = 4 * POINTS**2 * maps.shape[3] * high * wide
    size = max(CHUNK_BYTES * torch.get_num_threads(), 4 * kernels.numel()) // image_bytes + 1
    return [slice(start, start + size) for start in range(0, n, size)]


def evaluation(like: Tensor) -> Tensor:
    """Return the matrix (36, 9) that evaluates a 3x3 kernel at the 6 x 6 points of the Winograd algorithm.

    The matrix has the device and dtype of the tensor `like`.
    """
    rows = torch.tensor(KERNEL_AT_POINTS, dtype=torch.float64)
    return torch.kron(rows, rows).to(like)


def kernel_points(weight: Tensor) -> Tensor:
    """Evaluate 3x3 kernels at the 6 x 6 points of the Winograd algorithm: (O, C, 3, 3) -> (36, C, O).

    One of the two channel dimensions has the smaller stride in `weight`. The same one has the smaller stride in the
    result.
    """
    if weight.stride(0) < weight.stride(1):  # the gradient of the images swaps the input and output channels
        return torch.matmul(evaluation(weight), weight.permute(1, 2, 3, 0).flatten(1, 2)).transpose(0, 1)
    return torch.matmul(evaluation(weight), weight.permute(0, 2, 3, 1).flatten(1, 2)).permute(1, 2, 0)
