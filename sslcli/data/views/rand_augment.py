"""RandAugment: a few of fifteen operations a view, drawn for each image, on batches.

Cubuk et al. 2020, https://arxiv.org/abs/1909.13719, with the operations, the magnitudes and the chance of one half that
PyContrast trains InfoMin with (pycontrast/datasets/RandAugment.py, after timm's auto_augment.py). The images of a batch
are sorted by operation, so that each operation runs once. Where an operation is defined on 8 bits (equalize, posterize,
the two that solarize) values are rounded to them first; everything else keeps its precision.

Shapes: N images, C = 1 or 3 channels, H x W pixels; images are float in [0, 1].
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

# The geometric ones are last, and so are one slice of the sorted images.
OPERATIONS = (
    *("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
    *("color", "contrast", "brightness", "sharpness"),
    *("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
MOST = 10.0  # the largest magnitude
STREAMS = 6  # uniform numbers that one operation of one image takes
_GEOMETRIC = OPERATIONS.index("rotate")
_CUBIC = -1.0  # the coefficient of PIL's bicubic transforms; its resize has another


def rand_augment(
    images: Tensor, draws: Tensor, *, magnitude: float, std: float, probability: float, fill: Tensor
) -> Tensor:
    """One operation after the other, as many as there are draws for.

    Args:
        images: (N, C, H, W).
        draws: (L, STREAMS, N) uniform in [0, 1), for L operations an image; best on the CPU. L = 0 changes nothing.
        magnitude: mean of the normal distribution of the magnitude, in [0, 10]; what is drawn is clipped to that.
        std: its deviation, at least 0.
        probability: of each of the L operations to happen at all.
        fill: (C,) color of what geometric operations uncover, in [0, 1].

    Returns:
        (N, C, H, W) of the dtype of `images`, in [0, 1].
    """
    work = in_working_precision(images)
    for which, happens, radius, angle, sign, smooth in draws:
        normal = torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * math.pi * angle)  # Box and Muller
        level = (magnitude + std * normal).clamp(0, MOST)
        operation = torch.where(happens < probability, (which * len(OPERATIONS)).long(), len(OPERATIONS))
        order = operation.argsort(stable=True)
        work = work.index_select(0, order.to(work.device, non_blocking=True))
        sides = torch.arange(len(OPERATIONS) + 1, device=operation.device)
        ends = torch.searchsorted(operation[order], sides).tolist()
        for number in range(_GEOMETRIC):
            rows = slice(ends[number], ends[number + 1])
            if rows.start < rows.stop:
                work[rows] = _recolor(OPERATIONS[number], work[rows], level[order[rows]])
        rows = slice(ends[_GEOMETRIC], ends[-1])
        if rows.start < rows.stop:
            chosen = order[rows]
            signed = torch.where(sign[chosen] < 0.5, -level[chosen], level[chosen])
            matrix = _matrices(operation[chosen], signed, *work.shape[2:])
            work[rows] = affine(work[rows], matrix, smooth[chosen] < 0.5, fill)
        work = work.index_select(0, order.argsort().to(work.device, non_blocking=True))
    return work.to(images.dtype)


def operate(name: str, images: Tensor, level: Tensor, *, bicubic: Tensor, fill: Tensor) -> Tensor:
    """The operation `name` at level (N,) in [0, 10], or [-10, 10] for the geometric ones.

    bicubic: (N,) bool, of geometric operations: bicubic in place of bilinear.
    """
    number = OPERATIONS.index(name)
    if number < _GEOMETRIC:
        return _recolor(name, images, level)
    return affine(images, _matrices(torch.full((len(level),), number), level, *images.shape[2:]), bicubic, fill)


def _recolor(name: str, images: Tensor, level: Tensor) -> Tensor:
    """An operation that moves no pixel."""
    share = level / MOST
    factor = 0.1 + 1.8 * share
    if name == "auto_contrast":
        return auto_contrast(images)
    if name == "equalize":
        return equalize(images)
    if name == "invert":
        return 1 - images
    if name == "posterize":
        return posterize(images, (share * 4).floor())
    if name == "solarize":
        threshold = (share * 256).floor()
        return torch.where(_levels(images) < column(threshold, images), images, 1 - images)
    if name == "solarize_add":
        brighter = images + column((share * 110).floor() / 255, images)
        return torch.where(_levels(images) < 128, brighter.clamp(max=1), images)
    if name == "color":
        return adjust_saturation(images, factor)
    if name == "contrast":
        return adjust_contrast(images, factor)
    if name == "brightness":
        return adjust_brightness(images, factor)
    return adjust_sharpness(images, factor)


def _levels(images: Tensor) -> Tensor:
    """The 8 bits nearest to each value, as whole floats."""
    return (images * 255).round_()


def auto_contrast(images: Tensor) -> Tensor:
    """Each channel of each image stretched so that its least value is 0 and its greatest 1; a flat one stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    spread = high - low
    flat = spread <= 0
    return torch.where(flat, images, ((images - low) / torch.where(flat, 1, spread)).clamp(0, 1))


def equalize(images: Tensor) -> Tensor:
    """Each channel of each image with a histogram as even as 256 levels allow; as PIL's, one of few pixels stays."""
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
    """Keep the `bits` (N,) highest of 8 bits of each value; 0 is black."""
    step = column(2 ** (8 - bits), images)
    return (_levels(images) / step).floor_() * step / 255


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image smoothed by PIL's SMOOTH filter: factor (N,) 0 gives that, 1 the image, more exaggerates."""
    if min(images.shape[2:]) < 3:
        return images
    inner = images[:, :, 1:-1, 1:-1]
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13
    out = images.clone()  # the edge has no neighbors and stays
    weight = column(factor, images)
    out[:, :, 1:-1, 1:-1] = (inner * weight + smooth * (1 - weight)).clamp_(0, 1)
    return out


def _matrices(operation: Tensor, level: Tensor, height: int, width: int) -> Tensor:
    """(N, 6): where a place of the result lies in the image, x' = a x + b y + c and y' = d x + e y + f."""
    share = level / MOST
    names = [OPERATIONS[number] for number in operation.tolist()]

    def where(name: str) -> Tensor:
        return torch.tensor([other == name for other in names], dtype=share.dtype, device=share.device)

    angle = torch.deg2rad(30 * share) * where("rotate")
    cos, sin = torch.cos(angle), torch.sin(angle)
    a, b, d, e = cos, -sin + 0.3 * share * where("shear_x"), sin + 0.3 * share * where("shear_y"), cos
    # A rotation is about the center; PIL's turns counter-clockwise as y points down.
    turned = where("rotate")
    c = 0.45 * width * share * where("translate_x") + turned * (width - cos * width + sin * height) / 2
    f = 0.45 * height * share * where("translate_y") + turned * (height - sin * width - cos * height) / 2
    return torch.stack((a, b, c, d, e, f), 1)


def affine(images: Tensor, matrix: Tensor, bicubic: Tensor, fill: Tensor) -> Tensor:
    """Draw each image again from where its matrix says, as PIL's Image.transform with AFFINE does.

    Args:
        images: (N, C, H, W).
        matrix: (N, 6) a, b, c, d, e, f: the pixel centered at (x, y) shows the image at (a x + b y + c, d x + e y + f).
        bicubic: (N,) bool; the others are bilinear.
        fill: (C,) color of what lies outside of the image.
    """
    out = torch.empty_like(images)
    for mask, radius in ((~bicubic, 1), (bicubic, 2)):
        rows = mask.nonzero().squeeze(1)
        if len(rows):
            here = rows.to(images.device, non_blocking=True)
            out[here] = _sample(
                images.index_select(0, here), matrix[rows].to(images.device, images.dtype), radius, fill
            )
    return out


def _sample(images: Tensor, matrix: Tensor, radius: int, fill: Tensor) -> Tensor:
    """`affine` for one filter: bilinear reaches 1 pixel to either side, bicubic 2."""
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
        for place, horizontal in zip(columns, left, strict=True):
            index = (line * width + place).view(count, 1, -1).expand(-1, channels, -1)
            part += flat.gather(2, index).view(images.shape) * horizontal.unsqueeze(1)
        out += part * vertical.unsqueeze(1)
    paint = fill.to(images.device, images.dtype).view(1, -1, 1, 1)
    return torch.where(outside.unsqueeze(1), paint, out.clamp_(0, 1))


def _taps(place: Tensor, length: int, radius: int) -> tuple[list[Tensor], list[Tensor]]:
    """Index and weight of the pixels around `place`, edges repeated."""
    first = (place - 0.5).floor()
    share = place - 0.5 - first
    index, weights = [], []
    for offset in range(1 - radius, radius + 1):
        index.append((first + offset).clamp(0, length - 1).long())
        distance = (share - offset).abs()
        weights.append(1 - distance if radius == 1 else _cubic(distance))
    return index, weights


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel at distances from 0 to 2, with the coefficient of PIL's transforms."""
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
    far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
    return torch.where(distance < 1, near, far)
