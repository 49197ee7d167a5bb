"""Batched RandAugment: for each view of each image, a few of fifteen operations are drawn and applied at random.

Source: Cubuk et al. 2020, https://arxiv.org/abs/1909.13719. Each drawn operation is applied with probability 0.5. This
probability, the operations and their magnitudes are the same as in the InfoMin training of PyContrast
(pycontrast/datasets/RandAugment.py, based on timm's auto_augment.py).

If L operations are drawn per view, there are L rounds. In each round, the images of a batch are sorted by operation, so
that each operation runs at most once. Four operations are defined on 8 bits: equalize, posterize, solarize and
solarize_add. They first round the values to 8 bits. The other operations do not round.

Shapes: N images, C channels, H x W pixels; images are float in [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslcli.data.views.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    column,
    in_working_precision,
)
from sslcli.distributed.devices import copy_to

# The geometric operations are last, so that the images with a geometric operation form one slice of the sorted batch.
OPERATIONS = (
    *("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
    *("color", "contrast", "brightness", "sharpness"),
    *("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
MAX_MAGNITUDE = 10.0
STREAMS = 6  # uniform random numbers per operation and image
_GEOMETRIC = OPERATIONS.index("rotate")
_CUBIC = -1.0  # coefficient of Keys' kernel in PIL's Image.transform; Image.resize uses -0.5


def rand_augment(
    images: Tensor, draws: Tensor, *, magnitude: float, std: float, probability: float, fill: Tensor
) -> Tensor:
    """Draw L operations for each image. Apply each of them with the given probability, one after the other.

    Args:
        images: (N, C, H, W).
        draws: (L, STREAMS, N) uniform random numbers in [0, 1), preferably on the CPU. L is the number of operations
            per image. STREAMS is the number of random numbers per operation and image. With L = 0, the images are
            returned unchanged.
        magnitude: mean of the normal distribution of the magnitude, in [0, 10]. Drawn magnitudes are clipped to
            [0, 10].
        std: standard deviation of this normal distribution, at least 0.
        probability: probability that each of the L operations is applied.
        fill: (C,) color in [0, 1]. Geometric operations fill the area outside of the original image with this color.

    Returns:
        (N, C, H, W) of the dtype of `images`, in [0, 1].
    """
    work = in_working_precision(images)
    for operation_draw, apply_draw, radius, angle, sign_draw, filter_draw in draws:
        normal = torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * math.pi * angle)  # Box-Muller transform
        level = (magnitude + std * normal).clamp(0, MAX_MAGNITUDE)
        operation = torch.where(apply_draw < probability, (operation_draw * len(OPERATIONS)).long(), len(OPERATIONS))
        order = operation.argsort(stable=True)
        work = work.index_select(0, copy_to(work.device, order))
        numbers = torch.arange(len(OPERATIONS) + 1, device=operation.device)
        ends = torch.searchsorted(operation[order], numbers).tolist()
        for number in range(_GEOMETRIC):
            rows = slice(ends[number], ends[number + 1])
            if rows.start < rows.stop:
                work[rows] = _recolor(OPERATIONS[number], work[rows], level[order[rows]])
        rows = slice(ends[_GEOMETRIC], ends[-1])
        if rows.start < rows.stop:
            chosen = order[rows]
            signed = torch.where(sign_draw[chosen] < 0.5, -level[chosen], level[chosen])
            matrix = _matrices(operation[chosen], signed, *work.shape[2:])
            work[rows] = affine(work[rows], matrix, filter_draw[chosen] < 0.5, fill)
        work = work.index_select(0, copy_to(work.device, order.argsort()))
    return work.to(images.dtype)


def apply_operation(name: str, images: Tensor, level: Tensor, *, bicubic: Tensor, fill: Tensor) -> Tensor:
    """Apply the operation `name` to images (N, C, H, W).

    level: (N,) magnitudes, in [-10, 10] for geometric operations and in [0, 10] for the other operations.
    bicubic: (N,) bool. True selects bicubic interpolation for geometric operations, False bilinear interpolation.
    fill: (C,) color, see `rand_augment`.
    """
    number = OPERATIONS.index(name)
    if number < _GEOMETRIC:
        return _recolor(name, images, level)
    return affine(images, _matrices(torch.full((len(level),), number), level, *images.shape[2:]), bicubic, fill)


def _recolor(name: str, images: Tensor, level: Tensor) -> Tensor:
    """Apply the operation `name`, which is not geometric, to images (N, C, H, W).

    `level` (N,) is the magnitude of the operation for each image, in [0, 10].
    """
    strength = level / MAX_MAGNITUDE
    factor = 0.1 + 1.8 * strength
    if name == "auto_contrast":
        return auto_contrast(images)
    if name == "equalize":
        return equalize(images)
    if name == "invert":
        return 1 - images
    if name == "posterize":
        return posterize(images, (strength * 4).floor())
    if name == "solarize":
        threshold = (strength * 256).floor()
        return torch.where(_levels(images) < column(threshold, images), images, 1 - images)
    if name == "solarize_add":
        brighter = images + column((strength * 110).floor() / 255, images)
        return torch.where(_levels(images) < 128, brighter.clamp(max=1), images)
    if name == "color":
        return adjust_saturation(images, factor)
    if name == "contrast":
        return adjust_contrast(images, factor)
    if name == "brightness":
        return adjust_brightness(images, factor)
    return adjust_sharpness(images, factor)


def _levels(images: Tensor) -> Tensor:
    """Round values in [0, 1] to 8 bits. Return them as floats with integer values in [0, 255]."""
    return (images * 255).round_()


def auto_contrast(images: Tensor) -> Tensor:
    """Scale each channel of each image to the range [0, 1]. Leave constant channels unchanged."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    spread = high - low
    flat = spread <= 0
    return torch.where(flat, images, ((images - low) / torch.where(flat, 1, spread)).clamp(0, 1))


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of each channel of each image, over 256 levels.

    As in PIL, a channel does not change if fewer than 255 of its pixels have a value below the maximum of the channel.
    """
    count, channels, height, width = images.shape
    level = _levels(images).long().flatten(2)  # (N, C, H * W)
    histogram = torch.zeros(count, channels, 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(2, level, torch.ones_like(level))
    brightest = histogram.gather(2, level.amax(2, keepdim=True))
    step = (height * width - brightest) // 255
    below = histogram.cumsum(2) - histogram
    table = (below + step // 2) // step.clamp(min=1)
    even = table.clamp_(max=255).gather(2, level).view(images.shape).to(images.dtype) / 255
    return torch.where(step.unsqueeze(3) > 0, even, images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep only the highest `bits` (N,) of the 8 bits of each value. With 0 bits, the image is black."""
    step = column(2 ** (8 - bits), images)
    return (_levels(images) / step).floor_() * step / 255


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its smoothed version (PIL's SMOOTH filter), and clamp to [0, 1].

    Pixels at the edges do not change.

    `factor` (N,): 0 gives the smoothed image, 1 the unchanged image, and above 1 a sharper image.
    """
    if min(images.shape[2:]) < 3:
        return images
    inner = images[:, :, 1:-1, 1:-1]
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13
    out = images.clone()  # edge pixels do not change, because some of their neighbors are missing
    weight = column(factor, images)
    out[:, :, 1:-1, 1:-1] = (inner * weight + smooth * (1 - weight)).clamp_(0, 1)
    return out


def _matrices(operation: Tensor, level: Tensor, height: int, width: int) -> Tensor:
    """Return the matrices (N, 6) that map a pixel (x, y) of the result to a point of the image.

    The six columns are a, b, c, d, e, f. The point is (a x + b y + c, d x + e y + f).

    operation: (N,) int64, the index in `OPERATIONS` of each image's geometric operation.
    level: (N,) magnitude of each operation, in [-10, 10].
    """
    strength = level / MAX_MAGNITUDE
    names = [OPERATIONS[number] for number in operation.tolist()]

    def mask(name: str) -> Tensor:
        return torch.tensor([other == name for other in names], dtype=strength.dtype, device=strength.device)

    angle = torch.deg2rad(30 * strength) * mask("rotate")
    cos, sin = torch.cos(angle), torch.sin(angle)
    a, b, d, e = cos, -sin + 0.3 * strength * mask("shear_x"), sin + 0.3 * strength * mask("shear_y"), cos
    # Images are rotated counterclockwise about their center, as in PIL. The y axis points down.
    rotated = mask("rotate")
    c = 0.45 * width * strength * mask("translate_x") + rotated * (width - cos * width + sin * height) / 2
    f = 0.45 * height * strength * mask("translate_y") + rotated * (height - sin * width - cos * height) / 2
    return torch.stack((a, b, c, d, e, f), 1)


def affine(images: Tensor, matrix: Tensor, bicubic: Tensor, fill: Tensor) -> Tensor:
    """Resample each image with an affine transformation, as PIL's Image.transform does with AFFINE.

    Args:
        images: (N, C, H, W).
        matrix: (N, 6) a, b, c, d, e, f. The pixel of the result with the center (x, y) is read from the image at
            (a x + b y + c, d x + e y + f).
        bicubic: (N,) bool. True selects bicubic interpolation, False bilinear interpolation.
        fill: (C,) color of the area outside of the image.
    """
    out = torch.empty_like(images)
    for mask, radius in ((~bicubic, 1), (bicubic, 2)):
        rows = mask.nonzero().squeeze(1)
        if len(rows):
            target = copy_to(images.device, rows)
            own = copy_to(images.device, matrix[rows], images.dtype)
            out[target] = _sample(images.index_select(0, target), own, radius, fill)
    return out


def _sample(images: Tensor, matrix: Tensor, radius: int, fill: Tensor) -> Tensor:
    """Resample images as `affine` does, but with one filter for all images.

    The filter is bilinear for `radius` 1 and bicubic for `radius` 2.
    """
    count, channels, height, width = images.shape
    y = (torch.arange(height, device=images.device) + 0.5).to(images.dtype).view(1, -1, 1)
    x = (torch.arange(width, device=images.device) + 0.5).to(images.dtype).view(1, 1, -1)
    a, b, c, d, e, f = matrix.view(count, 6, 1, 1).unbind(1)
    across, down = a * x + b * y + c, d * x + e * y + f  # (N, H, W)
    outside = (across < 0) | (across >= width) | (down < 0) | (down >= height)
    columns, left = _taps(across, width, radius)
    lines, top = _taps(down, height, radius)
    flat = images.flatten(2)
    out = torch.zeros_like(images)
    for line, vertical in zip(lines, top, strict=True):
        part = torch.zeros_like(images)
        for position, horizontal in zip(columns, left, strict=True):
            index = (line * width + position).view(count, 1, -1).expand(-1, channels, -1)
            part += flat.gather(2, index).view(images.shape) * horizontal.unsqueeze(1)
        out += part * vertical.unsqueeze(1)
    color = copy_to(images.device, fill, images.dtype).view(1, -1, 1, 1)
    return torch.where(outside.unsqueeze(1), color, out.clamp_(0, 1))


def _taps(position: Tensor, length: int, radius: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the indices and the filter weights of the 2 * `radius` pixels around each position along one axis.

    Beyond the edge, the edge pixel is repeated.

    position: (N, H, W) coordinate in the image; the center of pixel i is at i + 0.5.
    length: number of pixels of the image along the axis.
    radius: radius of the filter in pixels: 1 = bilinear, 2 = bicubic.
    """
    first = (position - 0.5).floor()
    fraction = position - 0.5 - first
    index, weights = [], []
    for offset in range(1 - radius, radius + 1):
        index.append((first + offset).clamp(0, length - 1).long())
        distance = (fraction - offset).abs()
        weights.append(1 - distance if radius == 1 else _cubic(distance))
    return index, weights


def _cubic(distance: Tensor) -> Tensor:
    """Return the values of Keys' kernel with the coefficient `_CUBIC`, at distances from 0 to 2."""
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
    far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
    return torch.where(distance < 1, near, far)
