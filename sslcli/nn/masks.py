"""Masks of image patches for masked image modeling: random, grid cells, blocks, one visible block, target blocks.

The functions compute masks from random numbers in [0, 1), which `sslcli.nn.noise.Noise` draws. The masks therefore do
not depend on the number of processes, and a resumed run has the masks of an uninterrupted run. All shapes are known
before the masks are computed, so the host does not wait for the device.

Shapes: N images per process, G images of all processes, P = rows * columns patches per image, ordered row by row. True
means masked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslcli.distributed.collectives import rank, world_size
from sslcli.distributed.devices import constant, copy_to
from sslcli.nn.noise import Noise

ATTEMPTS = 10  # of iBOT and DINOv2: a mask is finished after this number of rejected blocks in a row
BLOCKS = 24  # number of blocks to draw per mask; more blocks do not change the mean number of masked patches
DRAWS = 4  # number of times that `multiblock_masks` draws the blocks of an image


class RandomMask(NamedTuple):
    """The result of `random_mask`."""

    keep: Tensor  # (N, K) int64, indices of the visible patches, in the order of their random numbers
    mask: Tensor  # (N, P) bool
    restore: Tensor  # (N, P) int64: patch p is at position restore[p] if the visible patches come first


def random_mask(numbers: Tensor, ratio: float) -> RandomMask:
    """Mask random patches of each image (MAE, arXiv:2111.06377).

    `numbers` (N, P) has one random number per patch. The int(P * (1 - `ratio`)) patches with the smallest numbers stay
    visible, as in the official code.
    """
    num_visible = int(numbers.shape[1] * (1 - ratio))
    order = numbers.argsort(dim=1, stable=True)
    restore = order.argsort(1)
    return RandomMask(order[:, :num_visible], restore >= num_visible, restore)


def cell_mask(numbers: Tensor, grid: tuple[int, int], *, cell: int, ratio: float) -> Tensor:
    """Mask random square cells of `cell` x `cell` patches (SimMIM, arXiv:2111.09886): (N, cells) -> (N, P).

    `numbers` has one random number per cell. The ceil(`ratio` * cells) cells with the smallest numbers are masked.
    `cell` must divide both sides of `grid`.
    """
    num_masked = math.ceil(ratio * numbers.shape[1])
    cells = numbers.argsort(dim=1, stable=True).argsort(1) < num_masked
    cells = cells.view(-1, grid[0] // cell, grid[1] // cell)
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2).flatten(1)


def block_mask(
    numbers: Tensor,
    targets: Tensor,
    grid: tuple[int, int],
    *,
    smallest: float,
    largest: float = math.inf,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Mask rectangular blocks that may overlap (BEiT, arXiv:2106.08254; iBOT and DINOv2), (N, P).

    Blocks are added until an image has its target number of masked patches, or until `ATTEMPTS` blocks in a row were
    rejected. A block is rejected if it masks no new patch, exceeds the target, or is as large as a side of the grid. An
    image may therefore have fewer masked patches than its target, see `with_exact_count`.

    Args:
        numbers: (N, B, 4) random numbers for B blocks, usually `BLOCKS`: area, aspect ratio, row and column.
        targets: (N,) number of patches to mask.
        grid: rows and columns of patches.
        smallest: minimum area of a block: (min(rows, columns) // 3)^2 in iBOT, 4 in DINOv2. If fewer patches are left
            to mask, the area is between this number and `smallest`.
        largest: maximum area of a block; P / 2 in DINOv2.
        aspect: range of height / width. Its logarithm is uniform.
    """
    rows, columns = grid
    row = torch.arange(rows, device=numbers.device)[:, None]
    column = torch.arange(columns, device=numbers.device)
    mask = torch.zeros(len(numbers), rows, columns, dtype=torch.bool, device=numbers.device)
    rejected = torch.zeros(len(numbers), dtype=torch.int64, device=numbers.device)
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for block in numbers.unbind(1):
        area, shape, top, left = block.unbind(1)
        room = (targets - mask.sum((1, 2))).clamp(max=largest)
        area = smallest + area * (room - smallest)
        ratio = (low + shape * (high - low)).exp()
        height, width = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        top, left = ((top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor())
        inside = _rectangle(row, column, *(each[:, None, None] for each in (top, left, height, width)))
        added = (inside & ~mask).sum((1, 2))
        accepted = (height < rows) & (width < columns) & (added > 0) & (added <= room) & (rejected < ATTEMPTS)
        mask |= inside & accepted[:, None, None]
        rejected = torch.where(accepted, 0, rejected + 1)
    return mask.flatten(1)


def with_exact_count(mask: Tensor, count: Tensor | int, numbers: Tensor) -> Tensor:
    """Return `mask` (N, P) with random patches added or removed, so that `count` patches of each image are masked.

    `count` is an integer or (N, 1) int64. `numbers` (N, P) has one random number per patch.
    """
    return (numbers - mask.to(numbers.dtype)).argsort(1).argsort(1) < count


def inverse_block_mask(
    numbers: Tensor, grid: tuple[int, int], *, ratio: float, aspect: tuple[float, float] = (0.5, 2.0)
) -> Tensor:
    """Mask all patches except one block per image (CAPI, arXiv:2502.08769), (N, P).

    Exactly int(`ratio` * P) patches are masked. A block that exceeds an edge of the grid continues at the opposite
    edge. If the number of visible patches is not height * width, the last row of the block is incomplete.

    `numbers` (N, 3) has the random numbers for aspect ratio, row and column. `aspect` is the range of height / width,
    reduced to the blocks that fit into `grid`. Its logarithm is uniform.
    """
    rows, columns = grid
    visible = rows * columns - int(ratio * rows * columns)
    low = max(math.log(aspect[0]), math.log(visible / columns**2))
    high = min(math.log(aspect[1]), math.log(rows**2 / (visible + 1e-5)))
    shape, top, left = numbers[..., None, None].unbind(1)  # (N, 1, 1) each
    ratios = (low + shape * (high - low)).exp()
    height, width = (visible * ratios).sqrt().ceil(), (visible / ratios).sqrt().ceil()
    row = (torch.arange(rows, device=numbers.device)[:, None] - (top * rows).floor()) % rows
    column = (torch.arange(columns, device=numbers.device) - (left * columns).floor()) % columns
    inside = (row < height) & (column < width) & (row * width + column < visible)
    return ~inside.flatten(1)


class MultiBlock(NamedTuple):
    """The result of `multiblock_masks`. All indices ascend."""

    context: Tensor  # (N, K) int64, indices of the visible patches
    targets: Tensor  # (B, N, M) int64, indices of the patches of B target blocks


def multiblock_masks(
    noise: Noise,
    num_images: int,
    grid: tuple[int, int],
    *,
    device: torch.device,
    num_targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_context: int = 10,
) -> MultiBlock:
    """Draw target blocks, and a context block from which the target blocks are removed (I-JEPA, arXiv:2301.08243).

    The sizes of the blocks are the same for all images of all processes, and change in every step. The contexts have
    the size of the smallest one in the global batch. The last patches of larger contexts are omitted. Every process
    draws the masks of all G images on the CPU, so the processes need not communicate.

    The official code lets a context overlap target blocks if it would otherwise have `min_context` patches or fewer.
    This function draws all blocks of the image again, up to `DRAWS` times, and then takes the largest context.

    Args:
        noise: generator of random numbers.
        num_images: images of this process, N.
        grid: rows and columns of patches.
        device: device of the result.
        num_targets: number of target blocks, B.
        target_scale: range of the area of a target block, as a fraction of P.
        target_aspect: range of height / width of a target block.
        context_scale: range of the area of the square context block, as a fraction of P.
        min_context: a context should have more patches than this.
    """
    generator = noise.shared()
    of_targets, of_context = torch.rand(2, generator=generator).tolist()
    target_size = block_size(of_targets, grid, scale=target_scale, aspect=target_aspect)
    context_size = block_size(of_context, grid, scale=context_scale, aspect=(1.0, 1.0))
    numbers = torch.rand(num_images * world_size(), DRAWS, num_targets + 1, 2, generator=generator)
    targets = torch.zeros(len(numbers), num_targets, math.prod(grid), dtype=torch.bool)
    contexts = torch.zeros(len(numbers), math.prod(grid), dtype=torch.bool)
    for draw in range(DRAWS):
        few = (contexts.sum(1) <= min_context).nonzero()[:, 0]  # all images in the first draw
        drawn = _placed(numbers[few, draw, :num_targets], target_size, grid)
        free = _placed(numbers[few, draw, num_targets], context_size, grid) & ~drawn.any(1)
        better = free.sum(1) > contexts[few].sum(1) if draw else torch.ones(len(few), dtype=torch.bool)
        targets[few[better]], contexts[few[better]] = drawn[better], free[better]
    own = slice(rank() * num_images, (rank() + 1) * num_images)
    context = _indices(contexts[own], int(contexts.sum(1).min()))
    blocks = _indices(targets[own].transpose(0, 1), math.prod(target_size))
    return MultiBlock(copy_to(device, context), copy_to(device, blocks))


def block_size(
    number: float, grid: tuple[int, int], *, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int]:
    """Return (height, width) of the blocks of `multiblock_masks`. The random `number` sets both area and aspect ratio.

    A side that reaches the side of the grid is reduced to one patch less, as in the official code.
    """
    rows, columns = grid
    area = int(rows * columns * (scale[0] + number * (scale[1] - scale[0])))
    ratio = aspect[0] + number * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(height, rows - 1), min(width, columns - 1)


def choice_of_ratios(numbers: Tensor, ratios: tuple[float, ...], variations: tuple[float, ...]) -> Tensor:
    """Return one mask ratio per image (iBOT, arXiv:2111.07832), (N, 2) -> (N,).

    A ratio is one of `ratios`, changed by at most the value of `variations` at the same place. iBOT uses the ratios
    (0, 0.3) and the variations (0, 0.2), so half of the images have no mask.
    """
    choice = (numbers[:, 0] * len(ratios)).long()
    middle, variation = (constant(values, numbers.dtype, numbers.device)[choice] for values in (ratios, variations))
    return middle + (2 * numbers[:, 1] - 1) * variation


def spread_ratios(
    noise: Noise, num_images: int, *, low: float, high: float, fraction: float, device: torch.device
) -> Tensor:
    """Return one mask ratio per image, spread evenly over [`low`, `high`] in the global batch (DINOv2), (N,).

    int(`fraction` * G) images are masked, and the others get the ratio 0. Let M be the number of masked images. The
    interval is divided into M equal parts, and each masked image has a random ratio in one of them.
    """
    total = num_images * world_size()
    num_masked = int(fraction * total)
    places = noise.permutation(num_images, device=device)
    numbers = noise.uniform(num_images, device=device)
    return torch.where(places < num_masked, low + (places + numbers) * (high - low) / max(num_masked, 1), 0.0)


def spread_limit(num_images: int, num_patches: int, *, low: float, high: float, fraction: float) -> int:
    """Return the largest number of patches that `spread_ratios` masks on one process, without reading the device.

    With one process, the ratios are known except for their order. With several processes, a random part of the masked
    images is on this process. Then six standard deviations are added to the mean, which suffices with a probability of
    about 1 - 1e-9.
    """
    total = num_images * world_size()
    num_masked = int(fraction * total)
    if num_masked == 0:
        return 0
    step = (high - low) / num_masked  # the largest ratios are low + step, low + 2 step, ...
    own = min(num_images, num_masked)
    most = own * low + step * own * (2 * num_masked - own + 1) / 2
    if num_images < total:
        mean = low + step * (num_masked + 1) / 2
        square = low**2 + low * step * (num_masked + 1) + step**2 * (num_masked + 1) * (2 * num_masked + 1) / 6
        mean, square = (number * num_masked / total for number in (mean, square))  # over all images
        most = min(most, num_images * mean + 6 * math.sqrt(num_images * (square - mean**2)))
    return int(most * num_patches + 1e-3 * own)  # the ratios are float32


def take_patches(tokens: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens (N, K, D) at `indices` (N, K) int64 of `tokens` (N, P, D).

    For `indices` (B, N, K), the result is (B * N, K, D): the tokens of all images for the first indices come first.
    """
    if indices.ndim == 3:
        return torch.cat([take_patches(tokens, each) for each in indices])
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[2]))


def _rectangle(row: Tensor, column: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Return True inside of rectangles, with the broadcast shape of all arguments."""
    return ((row >= top) & (row < top + height)) & ((column >= left) & (column < left + width))


def _placed(numbers: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return blocks of one size at random places: (..., 2) -> (..., P) bool.

    As in the official code, no block contains the last row or the last column.
    """
    (rows, columns), (height, width) = grid, size
    places = (numbers * torch.tensor([rows - height, columns - width])).floor()
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    top, left = places[..., None, None].unbind(-3)
    return _rectangle(row, column, top, left, torch.tensor(height), torch.tensor(width)).flatten(-2)


def _indices(mask: Tensor, count: int) -> Tensor:
    """Return the first `count` indices at which `mask` (..., P) is True: (..., count) int64."""
    return mask.logical_not().int().argsort(dim=-1, stable=True)[..., :count]
