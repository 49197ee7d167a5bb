"""Batched augmentations of images (N, C, H, W): crop, flip and blur.

The color operations of `sslcli.data.views.color` are re-exported. Each parameter of an operation has one value per
image. There is no loop over images. No function modifies its input.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sslcli.data.views.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_to_rows,
    check_scale,
    color_jitter,
    in_working_precision,
    normalize,
    rgb_to_lab,
    rgb_to_ydbdr,
    solarize,
    to_grayscale,
)
from sslcli.distributed.devices import copy_to
from sslcli.kernels import resize

__all__ = [
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "check_scale",
    "color_jitter",
    "crop_boxes",
    "flip",
    "gaussian_blur",
    "normalize",
    "resized_crop",
    "rgb_to_lab",
    "rgb_to_ydbdr",
    "solarize",
    "to_grayscale",
]

INTERPOLATIONS = ("bilinear", "bicubic")


def crop_boxes(
    area: Tensor, ratio: Tensor, offset: Tensor, height: Tensor, width: Tensor, *, ratio_range: tuple[float, float]
) -> Tensor:
    """Return the first candidate box that fits each image, as torchvision's RandomResizedCrop.get_params does.

    Args:
        area: (N, T) float, area of each of T candidates as a fraction of the image.
        ratio: (N, T) float, width / height of each candidate.
        offset: (N, 2) float in [0, 1), the vertical and the horizontal position of the box. 0 places the box at the top
            or left edge, and the largest values place it at the bottom or right edge.
        height, width: (N,) int64 size of each image in pixels.
        ratio_range: allowed range of width / height. If no candidate fits an image, the largest centered box
            with an allowed ratio is returned.

    Returns:
        (N, 4) int64 top, left, height, width.
    """
    pixels = area * (height * width).unsqueeze(1)
    box_height, box_width = torch.sqrt(pixels / ratio).round().long(), torch.sqrt(pixels * ratio).round().long()
    fits = (box_width > 0) & (box_width <= width.unsqueeze(1))
    fits &= (box_height > 0) & (box_height <= height.unsqueeze(1))
    first = fits.long().argmax(1, keepdim=True)
    box_height, box_width = box_height.gather(1, first).squeeze(1), box_width.gather(1, first).squeeze(1)
    top = (offset[:, 0] * (height - box_height + 1)).long()
    left = (offset[:, 1] * (width - box_width + 1)).long()
    boxes = torch.stack((top, left, box_height, box_width), 1)
    return torch.where(fits.any(1, keepdim=True), boxes, _centered_boxes(height, width, ratio_range))


def _centered_boxes(height: Tensor, width: Tensor, ratio_range: tuple[float, float]) -> Tensor:
    """Return (N, 4) int64, for each image the largest centered box whose width / height is in `ratio_range`.

    height, width: (N,) int64 size of each image in pixels.
    """
    shape = width.double() / height
    box_height = torch.where(shape < ratio_range[0], (width.double() / ratio_range[0]).round().long(), height)
    box_width = torch.where(shape > ratio_range[1], (height.double() * ratio_range[1]).round().long(), width)
    # In a small image, the shorter side of a very long or very flat box would be rounded to 0 pixels.
    box_height, box_width = box_height.clamp(min=1), box_width.clamp(min=1)
    top = torch.div(height - box_height, 2, rounding_mode="floor")
    left = torch.div(width - box_width, 2, rounding_mode="floor")
    return torch.stack((top, left, box_height, box_width), 1)


def resized_crop(images: Tensor, boxes: Tensor, size: int, *, interpolation: str = "bilinear") -> Tensor:
    """Crop a box from each image and resize it to (size, size), with antialiasing.

    The result equals the result of `torchvision.transforms.v2.functional.resized_crop(..., antialias=True)`. Pixels
    outside of the box have no effect. Resampling is separable and linear. Therefore each image is multiplied by two
    matrices of filter weights, one per direction.

    Args:
        images: (N, C, H, W), uint8 (divided by 255) or float in [0, 1].
        boxes: (N, 4) int64 top, left, height, width. A box must be inside the image and have at least one pixel.
        size: side of the result in pixels.
        interpolation: "bilinear" or "bicubic" (Keys' kernel with a = -0.5, as in Pillow). Bicubic results are clamped
            to [0, 1].

    Returns:
        (N, C, size, size) in [0, 1]. The dtype is float32 for uint8 images, else the dtype of the images.

    Raises:
        ValueError: `size` is below 1, or the interpolation is unknown.
    """
    if size < 1:
        raise ValueError(f"size is {size}, but it must be at least 1 pixel")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {interpolation!r}, but it must be one of {', '.join(INTERPOLATIONS)}")
    crops = resize.resized_crops(images, boxes, size, cubic=interpolation == "bicubic")
    if crops is not None:
        return crops
    count, channels, height, width = images.shape
    dtype = images.dtype if images.is_floating_point() else torch.float32
    work = torch.float64 if dtype == torch.float64 else torch.float32
    top, left, box_height, box_width = copy_to(images.device, boxes).unbind(1)
    vertical = _resize_weights(top, box_height, height, size, interpolation, work)
    horizontal = _resize_weights(left, box_width, width, size, interpolation, work)
    if images.dtype == torch.uint8:
        vertical = vertical.div_(255)
    # The channels are concatenated along the width, so that each matrix product resizes all channels of an image.
    rows = images.transpose(1, 2).to(work, memory_format=torch.contiguous_format)
    rows = torch.bmm(vertical, rows.reshape(count, height, channels * width))
    out = torch.bmm(rows.view(count, size * channels, width), horizontal.transpose(1, 2))
    out = out.view(count, size, channels, size).transpose(1, 2).contiguous()
    # Because of rounding, a row of weights may sum to slightly more than 1. The clamp ensures values in [0, 1].
    return out.clamp_(0, 1).to(dtype)


def _resize_weights(
    start: Tensor, length: Tensor, pixels: int, size: int, interpolation: str, dtype: torch.dtype
) -> Tensor:
    """Return the weights (N, size, pixels) that resize one box of each of N images to `size` pixels along one axis.

    `pixels` is the number of pixels of an image along this axis. An output pixel is the weighted sum of the input
    pixels. The weights of an output pixel sum to 1. The weights of pixels outside of the box are 0.

    start, length: (N,) int64, first pixel and number of pixels of each box along the axis.
    interpolation: "bilinear" or "bicubic".
    """
    position = torch.arange(pixels, device=start.device) - start.unsqueeze(1)
    inside = (position >= 0) & (position < length.unsqueeze(1))
    scale = (length.to(dtype) / size).unsqueeze(1)
    # For downscaling, the filter is widened so that every input pixel affects the result. For upscaling, the filter is
    # not widened.
    inverse_width = 1 / scale.clamp(min=1)
    # A pixel outside of the box gets a position so far away that its filter weight is 0.
    pixel = torch.where(inside, (position + 0.5) * inverse_width, 1e4)
    center = (torch.arange(size, device=start.device) + 0.5) * (scale * inverse_width)
    distance = (pixel.unsqueeze(1) - center.unsqueeze(2)).abs_()
    if interpolation == "bilinear":
        weights = distance.neg_().add_(1).clamp_(min=0)
    else:
        weights = _keys_cubic(distance)
    return weights.div_(weights.sum(2, keepdim=True))


def _keys_cubic(distance: Tensor) -> Tensor:
    """Return the values of Keys' cubic convolution kernel (1981) with a = -0.5, at distances >= 0 in pixels."""
    distance = distance.clamp_(max=2)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far)


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Flip images left-right. Only the images for which `mask` (N,) is True are flipped."""
    return apply_to_rows(images, mask, lambda part, rows: part.flip(3))


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int, mask: Tensor) -> Tensor:
    """Blur the images for which `mask` is True. Each image has its own standard deviation.

    The result equals the result of torchvision's gaussian_blur. The image is padded by reflection and convolved with a
    normalized kernel of `kernel_size` taps. The blur is separable and linear. Therefore each image is multiplied by a
    banded matrix from the left (vertical blur) and from the right (horizontal blur).

    Args:
        images: (N, C, H, W).
        sigma: (N,) standard deviation in pixels. It must be above 0 for images that are blurred.
        kernel_size: odd, at most 2 * min(H, W) - 1.
        mask: (N,) bool, True for images that are blurred.

    Raises:
        ValueError: kernel_size is even, below 1, or too large for the images.
    """
    channels, height, width = images.shape[1:]
    check_taps(kernel_size, height, width)

    def operation(part: Tensor, rows: Tensor) -> Tensor:
        work = in_working_precision(part)
        kernels = _gaussian_kernels(copy_to(work.device, sigma[rows], work.dtype), kernel_size)
        like = (work.dtype, work.device)
        vertical = kernels @ _reflected_shifts(kernel_size, height, *like)
        horizontal = vertical if height == width else kernels @ _reflected_shifts(kernel_size, width, *like)
        n = len(work)
        side = work.transpose(1, 2).reshape(n, height, channels * width)
        side = torch.bmm(vertical.view(n, height, height), side).view(n, height * channels, width)
        out = torch.bmm(side, horizontal.view(n, width, width).transpose(1, 2))
        return out.view(n, height, channels, width).transpose(1, 2).contiguous().to(part.dtype)

    return apply_to_rows(images, mask, operation)


def check_taps(kernel_size: int, height: int, width: int) -> None:
    """Raise ValueError unless `kernel_size` is odd, at least 1, and at most 2 * min(height, width) - 1."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, but it must be an odd number of at least 1")
    if kernel_size // 2 >= min(height, width):
        raise ValueError(
            f"kernel_size is {kernel_size}, but for images of {height} x {width} pixels it must be at most "
            f"{2 * min(height, width) - 1}"
        )


def _gaussian_kernels(sigma: Tensor, kernel_size: int) -> Tensor:
    """Return N Gaussian kernels (N, kernel_size) with the standard deviations `sigma` (N,). Each kernel sums to 1."""
    offset = torch.arange(kernel_size, device=sigma.device) - kernel_size // 2
    kernels = torch.exp(-0.5 * (offset / sigma.unsqueeze(1)) ** 2)
    return kernels / kernels.sum(1, keepdim=True)


@lru_cache(maxsize=8)
def _reflected_shifts(kernel_size: int, pixels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one flattened matrix (pixels, pixels) per tap of a blur kernel: (kernel_size, pixels * pixels).

    The matrix of tap t, multiplied by a column of `pixels` pixels, shifts the column by t - kernel_size // 2 pixels.
    The column is continued beyond its ends by reflection.
    """
    index = torch.arange(pixels, device=device)
    source = index + (torch.arange(kernel_size, device=device) - kernel_size // 2).unsqueeze(1)
    source = source.abs()
    source = torch.where(source >= pixels, 2 * (pixels - 1) - source, source)
    return (source.unsqueeze(2) == index).view(kernel_size, pixels * pixels).to(dtype)
