"""The color operations of `color` and `augment` for large images on the CPU: one image after the other.

A batch of large images is many times larger than the caches, so that each operation on all of it waits for memory, and
threads that share each operation wait for each other after every one. Here an image goes through all operations while
it is in the cache, in place, with its parameters as plain numbers. Small images are better off in a batch, where an
operation is one call for hundreds of them; so are all on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sslcli.data.views import color

LARGE = 128 * 128  # pixels from which on one at a time is faster
_BAND = 32


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What is done to each of N images, in the order of the fields, but gray before the jitter if `gray_first`."""

    flipped: Tensor  # (N,) bool, left to right
    jittered: Tensor  # (N,) bool
    factors: Tensor  # (N, 4), see color_jitter
    order: Tensor  # (N, 4) int64, see color_jitter
    gray: Tensor  # (N,) bool
    gray_first: bool
    blurred: Tensor  # (N,) bool
    sigma: Tensor  # (N,) pixels
    taps: int
    solarized: Tensor  # (N,) bool
    threshold: float


def are_large(images: Tensor) -> bool:
    """Whether (N, C, H, W) images are better changed one at a time."""
    return images.device.type == "cpu" and images.shape[2] * images.shape[3] >= LARGE


def change(images: Tensor, parameters: Parameters, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Flip, jitter, gray, blur and solarize (N, C, H, W) images in [0, 1], as the batched operations do to rounding.

    At the end, (images - mean) / std, of one value a channel.
    """
    # Networks want the channels last, and here the image is in the cache.
    out = torch.empty_like(images, memory_format=torch.channels_last)
    flipped, solarized = parameters.flipped.tolist(), parameters.solarized.tolist()
    jittered, factors, order = parameters.jittered.tolist(), parameters.factors.tolist(), parameters.order.tolist()
    gray, blurred, sigma = parameters.gray.tolist(), parameters.blurred.tolist(), parameters.sigma.tolist()

    with one_thread():
        for row in range(len(images)):
            image = color.in_working_precision(images[row])
            image = image.flip(2) if flipped[row] else image.clone()
            if gray[row] and parameters.gray_first:
                image = to_gray(image)
            if jittered[row]:
                image = jitter(image, factors[row], order[row])
            if gray[row] and not parameters.gray_first:
                image = to_gray(image)
            if blurred[row]:
                image = blur(image, sigma[row], parameters.taps)
            if solarized[row]:
                image = torch.where(image >= parameters.threshold, 1 - image, image)
            out[row].copy_(color.normalize(image.unsqueeze(0), mean, std)[0])
    return out


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations take one thread: these are too short to be worth dividing, and data workers need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def jitter(image: Tensor, factors: list[float], order: list[int]) -> Tensor:
    """As `color_jitter` of one image (C, H, W), which is changed; factors and order are four numbers each."""
    for operation in order:
        factor = factors[operation]
        if operation == color.HUE:
            if factor != 0 and len(image) == 3:
                image = color.rotate_hue(image.unsqueeze(0), torch.tensor([factor])).squeeze(0)
        elif factor == 1:
            continue
        elif operation == color.BRIGHTNESS:
            image.mul_(factor).clamp_(0, 1)
        elif operation == color.CONTRAST:
            # The mean of the gray image is the gray of the means.
            mean = color.to_luma(image.mean(2).mean(1).view(1, -1, 1, 1)).item()
            image.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)
        else:
            gray = color.to_luma(image.unsqueeze(0))[0].mul_(1 - factor)
            image.mul_(factor).add_(gray).clamp_(0, 1)
    return image


def to_gray(image: Tensor) -> Tensor:
    """(C, H, W) in gray, with as many channels as before."""
    return color.to_luma(image.unsqueeze(0))[0].expand_as(image).contiguous()


def blur(image: Tensor, sigma: float, taps: int) -> Tensor:
    """As `gaussian_blur` of one image (C, H, W).

    A blur is a product with a banded matrix from both sides. Bands of 32 rows, or columns, are cut out of the reflected
    image and multiplied by one small matrix, which is the same for all: a fifth of the work of the whole matrix.
    """
    channels, height, width = image.shape
    radius = taps // 2
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=image.dtype) / sigma) ** 2)
    matrix = _banded(kernel / kernel.sum())
    rows, columns = -(-height // _BAND), -(-width // _BAND)
    image = pad(image, (radius, radius, radius, radius), mode="reflect")
    image = pad(image, (0, columns * _BAND - width, 0, rows * _BAND - height))
    # Each image row once more for every band it touches: (C, bands, 32 + taps - 1, W).
    parts = image.unfold(1, _BAND + taps - 1, _BAND).transpose(2, 3)
    image = torch.matmul(matrix, parts).reshape(channels * rows * _BAND, -1)
    parts = image.as_strided((columns, len(image), _BAND + taps - 1), (_BAND, image.shape[1], 1))
    image = torch.matmul(parts, matrix.t()).view(columns, channels, rows * _BAND, _BAND)
    return image.permute(1, 2, 0, 3).reshape(channels, rows * _BAND, columns * _BAND)[:, :height, :width]


def _banded(kernel: Tensor) -> Tensor:
    """(32, 32 + taps - 1): row i holds the kernel from column i on."""
    return pad(kernel, (_BAND - 1, _BAND - 1)).unfold(0, _BAND + len(kernel) - 1, 1).flip(0)
