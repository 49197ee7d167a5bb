"""Batched color operations on float images (N, C, H, W) in [0, 1].

If `torchvision.transforms.v2.functional` has a function of the same name, the results are equal. Unlike torchvision's
functions, the operations take one parameter per image and have no loop over images. Public functions do not modify
their input. Parameters and masks may be on the device of the images or on the CPU. Prefer the CPU: if a mask is on the
CPU, the function selects the images of the mask without waiting for the device. For float16 and bfloat16 images, all
computations are in float32, and only the result is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sslcli.distributed.devices import constant, copy_to

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# Ranges of the channels of Lab for all sRGB colors, as skimage converts them. The official code of CMC uses these
# ranges to map each channel to [-1, 1] (CMC/train_CMC.py).
_LAB_RANGE = ((0.0, 100.0), (-86.183, 98.233), (-107.857, 94.478))
LAB_MEAN = tuple((high + low) / 2 for low, high in _LAB_RANGE)
LAB_STD = tuple((high - low) / 2 for low, high in _LAB_RANGE)

# PyContrast normalizes YDbDr with these constants: the mean color of ImageNet, and half the width of each channel's
# range.
YDBDR_MEAN, YDBDR_STD = (0.457, -0.082, -0.052), (0.5, 1.331, 1.333)
_YDBDR_FROM_RGB = ((0.299, 0.587, 0.114), (-0.45, -0.883, 1.333), (-1.333, 1.116, 0.217))  # as in skimage.color

# The same values as in skimage.color: sRGB primaries, and the D65 white point of the 2 degree observer.
_XYZ_FROM_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)


def in_working_precision(images: Tensor) -> Tensor:
    """Convert float16 and bfloat16 images to float32, which has enough precision. Return other images unchanged."""
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images


def apply_to_rows(images: Tensor, mask: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Replace the images for which `mask` is True by `operation(images[rows], rows)`.

    `rows` are the int64 indices of the images for which `mask` is True, on the device of `mask`.
    """
    rows = mask.nonzero().squeeze(1)
    if rows.numel() == 0:
        return images
    if rows.numel() == len(images):
        return operation(images, rows)
    target = copy_to(images.device, rows)
    changed = operation(images.index_select(0, target), rows)
    # The changed rows are set to 0, then the new rows are added. The result is exact. On the CPU, this is several times
    # faster than index_copy or where.
    return (images * column(~mask, images)).index_add_(0, target, changed)


def column(values: Tensor, images: Tensor) -> Tensor:
    """Reshape parameters (N,) to (N, 1, 1, 1), with the device and dtype of the images, for broadcasting."""
    return copy_to(images.device, values, images.dtype).view(-1, 1, 1, 1)


def to_luma(images: Tensor) -> Tensor:
    """Convert images to gray. Return a new tensor (N, 1, H, W).

    The gray value of three channels is the ITU-R 601-2 luma with torchvision's rounded weights. The gray value of
    another number of channels is their mean.
    """
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _mean(gray: Tensor) -> Tensor:
    """Return the mean of each image, (N, 1, 1, 1)."""
    # The mean is computed in two steps. With a single step and a batch of one image, torch would split the sum among
    # threads. Then the last bits would depend on the batch size.
    return gray.mean(3, keepdim=True).mean(2, keepdim=True)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its `factor` (N,) >= 0 and clamp to [0, 1]. Factor 1 leaves an image unchanged."""
    work = in_working_precision(images)
    return (work * column(factor, work)).clamp_(0, 1).to(images.dtype)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with the mean value of its gray version, and clamp to [0, 1].

    `factor` (N,): 0 gives this mean, 1 the unchanged image, and above 1 more contrast.
    """
    work = in_working_precision(images)
    weight = column(factor, work)
    return (work * weight).add_(_mean(to_luma(work)) * (1 - weight)).clamp_(0, 1).to(images.dtype)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its gray version, and clamp to [0, 1].

    `factor` (N,): 0 gives the gray image, 1 the unchanged image, and above 1 more saturation.
    """
    work = in_working_precision(images)
    weight = column(factor, work)
    return (work * weight).add_(to_luma(work) * (1 - weight)).clamp_(0, 1).to(images.dtype)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Rotate the hue of each image in HSV by its `factor` (N,) in turns, in [-0.5, 0.5]. 0 leaves an image unchanged.

    Images whose number of channels is not three have no hue and do not change.
    """
    if images.shape[1] != 3:
        return images
    work = in_working_precision(images)
    return apply_to_rows(work, factor != 0, lambda part, rows: rotate_hue(part, factor[rows])).to(images.dtype)


def rotate_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of each image (3, H, W) in HSV by its number of `turns` (N,)."""
    # Only arithmetic is used, because comparisons and `where` are several times slower on the CPU.
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    # The usual definition of the hue has six branches. In units of 60 degrees, all branches are equal to
    # +-(1 + (g + b - r - min) / chroma), where the sign is negative if b > g. The chroma of a gray pixel is 0, so the
    # hue of a gray pixel has no effect.
    hue = (green + blue).sub_(red).sub_(least).div_(chroma.clamp(min=torch.finfo(images.dtype).tiny))
    hue = hue.add_(1).copysign_(green - blue).add_(column(turns, images)[:, 0] * 6)
    hue.sub_((hue / 6).floor_().mul_(6))
    # The channels are v - c * clamp(min(k, 4 - k), 0, 1) with k = (n + hue) mod 6 for n = 5, 3, 1. The code below is an
    # equivalent form without the mod.
    out = torch.empty_like(images)
    for channel, center in enumerate((3, 2, 4)):
        distance = (hue - center).abs_()
        weight = distance.neg_().add_(2) if channel == 0 else distance.sub_(1)
        torch.sub(value, weight.clamp_(0, 1).mul_(chroma), out=out[:, channel])
    return out


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue. Each image has its own order of these four operations.

    The values are clamped to [0, 1] after each operation.

    Args:
        images: (N, C, H, W). Only images of three channels are rotated in hue. With one channel, saturation has no
            effect.
        factors: (N, 4). The first three columns are the factors of brightness, contrast and saturation. The last column
            is the rotation of the hue in turns. The row (1, 1, 1, 0) leaves an image unchanged.
        order: (N, 4) int64. Row i lists the columns of `factors` (0 to 3) in the order in which they are applied to
            image i.

    Returns:
        (N, C, H, W) of the dtype of `images`.
    """
    work = in_working_precision(images)
    # The slot of an operation is its place in the order, 0 to 3. Images are sorted into groups by the slot of their hue
    # rotation. A group is one slice of the sorted batch. In each slot, either the hue of all images of a group is
    # rotated, or all of them are blended. The fifth group contains images without hue rotation, which are blended with
    # factor 1 (no change) in its place. Images whose factors are all neutral are sorted after the groups and are not
    # changed.
    is_rotation = (order == HUE) & (factors[:, HUE : HUE + 1] != 0) & (images.shape[1] == 3)
    slot = torch.where(is_rotation.any(1), is_rotation.long().argmax(1), 4)
    slot = torch.where((factors[:, :HUE] == 1).all(1) & (factors[:, HUE] == 0), 5, slot)
    grouping = torch.argsort(slot, stable=True)
    grouped = work.index_select(0, copy_to(work.device, grouping))
    factors, order = factors[grouping], order[grouping]
    ends = torch.searchsorted(slot[grouping], torch.arange(5, device=slot.device), right=True).tolist()
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start < end:
            rows = slice(start, end)
            grouped[rows] = _jitter_group(grouped[rows], factors[rows], order[rows], group)
    return grouped.index_select(0, copy_to(work.device, grouping.argsort())).to(images.dtype)


def _jitter_group(images: Tensor, factors: Tensor, order: Tensor, hue_slot: int) -> Tensor:
    """Apply the color jitter to images that have the hue rotation at the same index in the order of their operations.

    This function modifies `images`.

    factors, order: as for `color_jitter`.
    hue_slot: index of the hue rotation in the order, 0 to 3. With 4, the hue is not rotated.
    """
    for slot in range(4):
        if slot == hue_slot:
            images = rotate_hue(images, factors[:, HUE])
            continue
        # Brightness, contrast and saturation are all computed as a blend f * image + (1 - f) * reference.
        operation = order[:, slot]
        factor = factors.gather(1, operation.unsqueeze(1)).squeeze(1)
        factor = torch.where(operation == HUE, 1.0, factor)
        gray = to_luma(images)
        from_mean = _mean(gray) * column((1 - factor) * (operation == CONTRAST), images)
        reference = gray.mul_(column((1 - factor) * (operation == SATURATION), images)).add_(from_mean)
        images = torch.addcmul(reference, images, column(factor, images), out=images).clamp_(0, 1)
    return images


def to_grayscale(images: Tensor, mask: Tensor) -> Tensor:
    """Convert the images for which `mask` (N,) is True to grayscale. The number of channels does not change."""

    def operation(part: Tensor, rows: Tensor) -> Tensor:
        return to_luma(in_working_precision(part)).to(part.dtype).expand_as(part)

    return apply_to_rows(images, mask, operation)


def solarize(images: Tensor, threshold: float, mask: Tensor) -> Tensor:
    """Invert the values >= `threshold` of the images for which `mask` (N,) is True. `threshold` is in [0, 1]."""
    return apply_to_rows(images, mask, lambda part, rows: torch.where(part >= threshold, 1 - part, part))


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert sRGB images to CIE Lab, as `skimage.color.rgb2lab` does (D65, 2 degree observer).

    Returns:
        (N, 3, H, W): L in [0, 100], a in about [-86.2, 98.2], b in about [-107.9, 94.5]. Normalization with LAB_MEAN
        and LAB_STD maps each channel to [-1, 1].

    Raises:
        ValueError: the images do not have three channels.
    """
    if images.shape[1] != 3:
        raise ValueError(f'color_space "lab" needs images of 3 channels, but these have {images.shape[1]}: use "rgb"')
    work = in_working_precision(images)
    linear = torch.where(work > 0.04045, ((work + 0.055) / 1.055) ** 2.4, work / 12.92)
    rows = []
    for coefficients, white in zip(_XYZ_FROM_RGB, _WHITE, strict=True):
        weights = [coefficient / white for coefficient in coefficients]
        tone = linear[:, 0] * weights[0] + linear[:, 1] * weights[1] + linear[:, 2] * weights[2]
        # `where` computes both branches for every pixel. The derivative of this root is infinite at 0, so `tone` is
        # clamped even for pixels that use the other branch.
        root = tone.clamp(min=0.008856) ** (1 / 3)
        rows.append(torch.where(tone > 0.008856, root, 7.787 * tone + 16.0 / 116.0))
    x, y, z = rows
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1).to(images.dtype)


def rgb_to_ydbdr(images: Tensor) -> Tensor:
    """Convert sRGB images to YDbDr, the color space of SECAM, as `skimage.color.rgb2ydbdr` does.

    The conversion is linear in the sRGB values.

    Returns:
        (N, 3, H, W): Y in [0, 1], Db and Dr in [-1.333, 1.333]. Normalize them with YDBDR_MEAN and YDBDR_STD.

    Raises:
        ValueError: the images do not have three channels.
    """
    if images.shape[1] != 3:
        raise ValueError(f'color_space "ydbdr" needs images of 3 channels, but these have {images.shape[1]}: use "rgb"')
    red, green, blue = in_working_precision(images).unbind(1)
    return torch.stack([red * r + green * g + blue * b for r, g, b in _YDBDR_FROM_RGB], 1).to(images.dtype)


def lab_to_rgb(images: Tensor) -> Tensor:
    """Apply the inverse of `rgb_to_lab`, for display. Colors outside of sRGB get values outside of [0, 1]."""
    lightness, a, b = in_working_precision(images).unbind(1)
    y = (lightness + 16) / 116
    tones = []
    for root, white in zip((y + a / 500, y, y - b / 200), _WHITE, strict=True):
        tones.append(white * torch.where(root > 0.008856 ** (1 / 3), root**3, (root - 16.0 / 116.0) / 7.787))
    linear = _apply_inverse(_XYZ_FROM_RGB, torch.stack(tones, 1))
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear)


def ydbdr_to_rgb(images: Tensor) -> Tensor:
    """Apply the inverse of `rgb_to_ydbdr`, for display."""
    return _apply_inverse(_YDBDR_FROM_RGB, in_working_precision(images))


def _apply_inverse(matrix: Sequence[Sequence[float]], images: Tensor) -> Tensor:
    """Apply the inverse of a 3 x 3 matrix to the channels of images (N, 3, H, W)."""
    inverse = torch.linalg.inv(torch.tensor(matrix, dtype=torch.float64)).to(images)
    return torch.einsum("ij,njhw->nihw", inverse, images)


def check_scale(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raise ValueError unless `mean` and `std` have one value per channel, and each std is above 0."""
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"mean is {tuple(mean)} and std is {tuple(std)}, but each must have one value for each of the {channels} "
            "channels"
        )
    if min(std) <= 0:
        raise ValueError(f"std is {tuple(std)}, but it must be above 0 in every channel")


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std, with one mean and one std per channel.

    Raises:
        ValueError: `mean` or `std` does not have one value per channel, or a std is not above 0.
    """
    check_scale(mean, std, images.shape[1])
    work = in_working_precision(images)
    center, scale = (constant(tuple(values), work.dtype, work.device).view(1, -1, 1, 1) for values in (mean, std))
    return (work - center).div_(scale).to(images.dtype)
