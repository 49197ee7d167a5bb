"""Batched augmentation of images (N, C, H, W): geometry and blur here, color in `color` (offered from here too).

Parameters are one value an image; there is no loop over images. None changes its input.
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
    check_scale,
    color_jitter,
    in_working_precision,
    normalize,
    rgb_to_lab,
    rgb_to_ydbdr,
    solarize,
    to_grayscale,
    where_rows,
)
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
    area: Tensor, ratio: Tensor, place: Tensor, height: Tensor, width: Tensor, *, ratio_range: tuple[float, float]
) -> Tensor:
    """The first of several tried boxes that fits into its image, as RandomResizedCrop.get_params of torchvision.

    Args:
        area: (N, T) float, area of each of T tries as a share of the image.
        ratio: (N, T) float, its width / height.
        place: (N, 2) float in [0, 1), where the box lies between the top and the bottom, the left and the right.
        height, width: (N,) int64 size of each image in pixels.
        ratio_range: where no try fits, the largest centered box whose width / height is in this range.

    Returns:
        (N, 4) int64 top, left, height, width.
    """
    pixels = area * (height * width).unsqueeze(1)
    box_height, box_width = torch.sqrt(pixels / ratio).round().long(), torch.sqrt(pixels * ratio).round().long()
    fits = (box_width > 0) & (box_width <= width.unsqueeze(1))
    fits &= (box_height > 0) & (box_height <= height.unsqueeze(1))
    first = fits.long().argmax(1, keepdim=True)
    box_height, box_width = box_height.gather(1, first).squeeze(1), box_width.gather(1, first).squeeze(1)
    top = (place[:, 0] * (height - box_height + 1)).long()
    left = (place[:, 1] * (width - box_width + 1)).long()
    found = torch.stack((top, left, box_height, box_width), 1)
    return torch.where(fits.any(1, keepdim=True), found, _centered(height, width, ratio_range))


def _centered(height: Tensor, width: Tensor, ratio_range: tuple[float, float]) -> Tensor:
    """The largest centered box of each image whose width / height is in the range, (N, 4)."""
    shape = width.double() / height
    box_height = torch.where(shape < ratio_range[0], (width.double() / ratio_range[0]).round().long(), height)
    box_width = torch.where(shape > ratio_range[1], (height.double() * ratio_range[1]).round().long(), width)
    top = torch.div(height - box_height, 2, rounding_mode="floor")
    left = torch.div(width - box_width, 2, rounding_mode="floor")
    return torch.stack((top, left, box_height, box_width), 1)


def resized_crop(images: Tensor, boxes: Tensor, size: int, *, interpolation: str = "bilinear") -> Tensor:
    """Cut a box out of each image and resize it to (size, size), with antialiasing.

    As `torchvision.transforms.v2.functional.resized_crop(..., antialias=True)`: pixels outside of the box are not used.
    Resampling is linear in the rows and in the columns, so each image is multiplied by two matrices of filter weights.

    Args:
        images: (N, C, H, W), uint8 (divided by 255) or float in [0, 1].
        boxes: (N, 4) int64 top, left, height, width, inside of the image, height and width at least 1.
        size: side of the result in pixels.
        interpolation: "bilinear", or "bicubic" (Keys, a = -0.5, as Pillow) whose overshoot is clamped to [0, 1].

    Returns:
        (N, C, size, size) float in [0, 1]; float32 for uint8 images, else the dtype of the images.

    Raises:
        ValueError: size below 1 or an unknown interpolation.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} must be one of {', '.join(INTERPOLATIONS)}")
    in_one_pass = resize.resized_crops(images, boxes, size, cubic=interpolation == "bicubic")
    if in_one_pass is not None:
        return in_one_pass
    count, channels, height, width = images.shape
    dtype = images.dtype if images.is_floating_point() else torch.float32
    work = torch.float64 if dtype == torch.float64 else torch.float32
    top, left, box_height, box_width = boxes.to(images.device, non_blocking=True).unbind(1)
    vertical = _resize_weights(top, box_height, height, size, interpolation, work)
    horizontal = _resize_weights(left, box_width, width, size, interpolation, work)
    if images.dtype == torch.uint8:
        vertical = vertical.div_(255)
    # With the rows of all channels side by side each product is one plain matrix product an image.
    rows = images.transpose(1, 2).to(work, memory_format=torch.contiguous_format)
    rows = torch.bmm(vertical, rows.reshape(count, height, channels * width))
    out = torch.bmm(rows.view(count, size * channels, width), horizontal.transpose(1, 2))
    out = out.view(count, size, channels, size).transpose(1, 2).contiguous()
    # Rows of weights sum to 1 only up to rounding, and the clamp promises [0, 1] to the operations that follow.
    return out.clamp_(0, 1).to(dtype)


def _resize_weights(
    start: Tensor, length: Tensor, pixels: int, size: int, interpolation: str, dtype: torch.dtype
) -> Tensor:
    """(N, size, pixels): weight of each input pixel in each output pixel; rows sum to 1, 0 outside of the window."""
    position = torch.arange(pixels, device=start.device) - start.unsqueeze(1)
    inside = (position >= 0) & (position < length.unsqueeze(1))
    scale = (length.to(dtype) / size).unsqueeze(1)
    # Shrinking widens the filter to cover all pixels; enlarging leaves it at one pixel's width.
    narrow = 1 / scale.clamp(min=1)
    # A pixel that is not in the window is put so far away that the filter is 0.
    pixel = torch.where(inside, (position + 0.5) * narrow, 1e4)
    center = (torch.arange(size, device=start.device) + 0.5) * (scale * narrow)
    distance = (pixel.unsqueeze(1) - center.unsqueeze(2)).abs_()
    if interpolation == "bilinear":
        weights = distance.neg_().add_(1).clamp_(min=0)
    else:
        weights = _keys_cubic(distance)
    return weights.div_(weights.sum(2, keepdim=True))


def _keys_cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5 (1981) at distances >= 0."""
    distance = distance.clamp_(max=2)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far)


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror the images of mask (N,) bool left to right."""
    return where_rows(images, mask, lambda part, rows: part.flip(3))


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int, mask: Tensor) -> Tensor:
    """Blur the images of a mask, each with its own width.

    As torchvision's gaussian_blur: a kernel of `kernel_size` taps, normalized, over the image reflected at its edges.
    The blur is separable and linear, so each image is multiplied by a banded matrix from both sides.

    Args:
        images: (N, C, H, W).
        sigma: (N,) standard deviation in pixels, above 0 where the mask is set.
        kernel_size: odd, at most twice the shorter side minus 1.
        mask: (N,) bool.

    Raises:
        ValueError: kernel_size even, below 1, or too large for the images.
    """
    channels, height, width = images.shape[1:]
    check_taps(kernel_size, height, width)

    def operation(part: Tensor, rows: Tensor) -> Tensor:
        work = in_working_precision(part)
        kernels = _gaussian_kernels(sigma[rows].to(work.device, work.dtype, non_blocking=True), kernel_size)
        like = (work.dtype, work.device)
        vertical = kernels @ _reflected_shifts(kernel_size, height, *like)
        horizontal = vertical if height == width else kernels @ _reflected_shifts(kernel_size, width, *like)
        n = len(work)
        side = work.transpose(1, 2).reshape(n, height, channels * width)
        side = torch.bmm(vertical.view(n, height, height), side).view(n, height * channels, width)
        out = torch.bmm(side, horizontal.view(n, width, width).transpose(1, 2))
        return out.view(n, height, channels, width).transpose(1, 2).contiguous().to(part.dtype)

    return where_rows(images, mask, operation)


def check_taps(kernel_size: int, height: int, width: int) -> None:
    """Raise ValueError unless a blur of so many taps fits images of this size."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be an odd number of at least 1")
    if kernel_size // 2 >= min(height, width):
        raise ValueError(
            f"kernel_size={kernel_size} is too large for images of {height} x {width} pixels; "
            f"it may be {2 * min(height, width) - 1} at most"
        )


def _gaussian_kernels(sigma: Tensor, kernel_size: int) -> Tensor:
    """(N, kernel_size), each row summing to 1."""
    offset = torch.arange(kernel_size, device=sigma.device) - kernel_size // 2
    kernels = torch.exp(-0.5 * (offset / sigma.unsqueeze(1)) ** 2)
    return kernels / kernels.sum(1, keepdim=True)


@lru_cache(maxsize=8)
def _reflected_shifts(kernel_size: int, pixels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(kernel_size, pixels * pixels): for each tap, the matrix that shifts an image reflected at its edges."""
    index = torch.arange(pixels)
    source = index + (torch.arange(kernel_size) - kernel_size // 2).unsqueeze(1)
    source = source.abs()
    source = torch.where(source >= pixels, 2 * (pixels - 1) - source, source)
    return (source.unsqueeze(2) == index).view(kernel_size, pixels * pixels).to(device, dtype)
