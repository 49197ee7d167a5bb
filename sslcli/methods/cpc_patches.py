"""Division of images into grids of overlapping patches, and augmentation of each patch.

Shapes: N images, S image side, g patches per side of the grid, p = 2 S / (g + 1) patch side, C channels, M = N g g
patches in total.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslcli.distributed.devices import constant
from sslcli.errors import check_positive
from sslcli.nn.noise import Noise

USUAL_GRID = 7  # CPC v1: 7 x 7 patches of 64 pixels out of 256
SMALLEST_PATCH = 8  # smaller patches are used only if `grid` or `min_patch_size` asks for them
USUAL_SKIP = 2  # CPC v2, appendix: steps_to_ignore
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
DRAWS = 12  # number of random numbers per patch


def patch_size(image_size: int, grid: int | None, *, min_patch_size: int = SMALLEST_PATCH) -> int:
    """Return the patch side p = 2 S / (g + 1) in pixels, where g is `grid`. Patches overlap by half.

    A value of g is valid if it is at least 3, and if p is an even whole number of at least 4. With grid=None, g is the
    valid value nearest to 7 for which p is at least `min_patch_size`. If there is no such value, g is the valid value
    with the largest p, provided that this p is at least 8.

    For example, with grid=None and min_patch_size=16, images of 32 pixels have 3 x 3 patches of 16 pixels. Images of
    64, 96 and 224 pixels have 7 x 7 patches of 16, 24 and 56 pixels.

    Raises ValueError if `grid` is not valid, or if there is no suitable g with grid=None. The message lists the valid
    values.
    """
    check_positive(min_patch_size=min_patch_size)
    fitting = [n for n in range(3, image_size) if image_size % (n + 1) == 0 and 2 * image_size // (n + 1) >= 4]
    named = ", ".join(map(str, fitting)) or "none"
    if grid is None:
        roomy = [n for n in fitting if 2 * image_size // (n + 1) >= min(min_patch_size, SMALLEST_PATCH)]
        if not roomy:
            raise ValueError(
                f"images of {image_size} pixels have no grid of 3 x 3 or more patches of {SMALLEST_PATCH} pixels or "
                f"more that overlap by half: set dataset.image_size to a size such as 32 (method.grid can be: {named})"
            )
        preferred = [n for n in roomy if 2 * image_size // (n + 1) >= min_patch_size]
        grid = min(preferred, key=lambda n: abs(n - USUAL_GRID)) if preferred else roomy[0]
    elif grid not in fitting:
        raise ValueError(
            f"grid is {grid}, but images of {image_size} pixels cannot be divided into {grid} x {grid} patches of 2 * "
            f"{image_size} / {grid + 1} pixels that overlap by half: set grid to one of {named}, or to null to choose "
            f"it automatically, or set dataset.image_size to a multiple of {grid + 1}"
        )
    return 2 * image_size // (grid + 1)


def row_offsets(steps: int | None, *, skip: int | None, grid: int) -> range:
    """Return the distances in rows between a context and the targets that are predicted from it.

    Args:
        steps: number of predicted rows; None = all rows below the skipped rows.
        skip: number of skipped rows directly below the context; None = 2, or 1 if the grid has 3 rows.
        grid: g, the number of rows of the grid.

    Raises ValueError if `skip` or `steps` is too large for the grid.
    """
    if skip is None:
        skip = min(USUAL_SKIP, grid - 2)
    most = grid - 1 - skip
    if skip < 0 or most < 1:
        raise ValueError(
            f"skip is {skip}, but it must be 0 to {grid - 2} to leave a row of the {grid} to predict, or null to "
            "choose it automatically"
        )
    if steps is not None and not 1 <= steps <= most:
        raise ValueError(
            f"steps is {steps}, but with {grid} rows of patches and skip={skip} it must be 1 to {most}: "
            "use null for all of them, or a larger grid"
        )
    return range(skip + 1, skip + 1 + (most if steps is None else steps))


def refuse_batch_norm(backbone: nn.Module) -> None:
    """Raise ValueError if the backbone has BatchNorm, because batch statistics leak information between patches."""
    norms = [name for name, part in backbone.named_modules() if isinstance(part, _BatchNorm)]
    if norms:
        raise ValueError(
            f"the backbone {type(backbone).__name__} has BatchNorm ({len(norms)} layers, the first is {norms[0]}), "
            "which leaks information between patches, so that predicting them becomes trivial: choose "
            "backbone=small_layernorm, or a resnet with backbone.norm=layer, or a vit"
        )


def patchify(images: Tensor, size: int) -> Tensor:
    """Divide images into patches that overlap by half: (N, C, S, S) -> (N, g, g, C, p, p), rows before columns.

    The patch side p is `size` pixels. Raises ValueError if the patches do not cover the whole image.
    """
    height, width = images.shape[-2:]
    if height != width or height % (size // 2) or height < size:
        raise ValueError(
            f"an image of {height} x {width} pixels cannot be divided into patches of {size} pixels that overlap "
            f"by half: its side must be a multiple of {size // 2}, at least {size}"
        )
    patches = images.unfold(2, size, size // 2).unfold(3, size, size // 2)  # (N, C, g, g, p, p)
    return patches.permute(0, 2, 3, 1, 4, 5)


class PatchAugmentation(nn.Module):
    """Random augmentation of each patch, independent of the other patches.

    It prevents the network from predicting a patch merely by continuing the colors and edges of its neighbors.

    Args:
        crop: fraction of the patch side that a random crop removes; 0 disables cropping. If it is not 0, at least one
            pixel is removed. The crop is padded with zeros. In CPC v1, the crop keeps 60 of the 64 pixels of a side.
        jitter: maximum strength of the changes of brightness, contrast and saturation.
        jitter_p: probability of color jitter per patch.
        grayscale: probability of conversion to gray per patch.
        drop_colors: probability per patch that two of its three channels are set to zero (Doersch et al. 2015).
        shear: maximum shear along each axis, in pixels per pixel.
        shear_p: probability of shear per patch.

    If the images do not have three channels, the only color operations are brightness and contrast. Pixels are not
    clamped, so the images may be normalized or not. Raises ValueError if an argument is outside [0, 1].
    """

    def __init__(
        self,
        *,
        crop: float = 0.0,
        jitter: float = 0.0,
        jitter_p: float = 0.0,
        grayscale: float = 0.0,
        drop_colors: float = 0.0,
        shear: float = 0.0,
        shear_p: float = 0.0,
    ) -> None:
        super().__init__()
        probabilities = {"jitter_p": jitter_p, "grayscale": grayscale, "drop_colors": drop_colors, "shear_p": shear_p}
        for name, value in ({"crop": crop, "jitter": jitter, "shear": shear} | probabilities).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, but it must lie in [0, 1]")
        self.crop, self.jitter, self.jitter_p, self.grayscale = crop, jitter, jitter_p, grayscale
        self.drop_colors, self.shear, self.shear_p = drop_colors, shear, shear_p

    def forward(self, patches: Tensor, noise: Noise) -> Tensor:
        """Return augmented patches: (N, g, g, C, p, p) -> the same shape, for g x g patches of side p per image.

        `noise` draws the random numbers. Each patch has its own random numbers.
        """
        num_images, rows, columns = patches.shape[:3]
        u = noise.uniform(num_images, rows * columns, DRAWS, device=patches.device).to(patches.dtype)
        draws = u.flatten(0, 1)  # (N g g, DRAWS)
        x = patches.flatten(0, 2)
        if self.jitter_p:
            strength = (draws[:, 1:4] * 2 - 1) * self.jitter
            x = jittered(x, strength * (draws[:, :1] < self.jitter_p))
        if self.grayscale and x.shape[1] == 3:
            x = torch.where(column(draws[:, 4] < self.grayscale), gray(x).expand_as(x), x)
        if self.drop_colors and x.shape[1] == 3:
            kept = F.one_hot((draws[:, 6] * 3).long(), 3).to(x.dtype)
            x = torch.where(column(draws[:, 5] < self.drop_colors), x * kept[:, :, None, None], x)
        if self.shear_p:
            slopes = (draws[:, 8:10] * 2 - 1) * self.shear
            x = torch.where(column(draws[:, 7] < self.shear_p), sheared(x, slopes), x)
        if self.crop:
            x = cropped(x, draws[:, 10:12], max(1, round(self.crop * x.shape[-1])))
        return x.reshape(patches.shape)


def column(values: Tensor) -> Tensor:
    """Reshape (M,) to (M, 1, 1, 1) for broadcasting over patches."""
    return values[:, None, None, None]


def gray(x: Tensor) -> Tensor:
    """Return the luma (M, 1, p, p) of color patches or images (M, 3, p, p)."""
    return torch.einsum("mchw,c->mhw", x, constant(LUMA, x.dtype, x.device))[:, None]


def jittered(x: Tensor, strength: Tensor) -> Tensor:
    """Change the brightness, contrast and saturation of patches (M, C, p, p) by `strength` (M, 3) in [-1, 1].

    The columns of `strength` are those of brightness, contrast and saturation. 0 changes nothing. Brightness is added
    to the pixels, as in the official code of SimCLR v1. Contrast scales the difference from the mean. Saturation
    scales the difference from the gray image.
    """
    brightness, contrast, saturation = (column(part) for part in strength.unbind(1))
    x = x + brightness
    x = x + contrast * (x - x.mean((1, 2, 3), keepdim=True))
    return x + saturation * (x - gray(x)) if x.shape[1] == 3 else x


def sheared(x: Tensor, slopes: Tensor) -> Tensor:
    """Shear patches (M, C, p, p) along both axes, with zero padding.

    `slopes` (M, 2) contains two displacements in pixels per patch: the horizontal displacement from one row to the
    next, and the vertical displacement from one column to the next.
    """
    one = torch.ones_like(slopes[:, 0])
    across = torch.stack([one, slopes[:, 0], 0 * one], 1)
    down = torch.stack([slopes[:, 1], one, 0 * one], 1)
    where = F.affine_grid(torch.stack([across, down], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, where, mode="bilinear", padding_mode="zeros", align_corners=False)


def cropped(x: Tensor, place: Tensor, margin: int) -> Tensor:
    """Remove `margin` pixels per axis by cropping, and center the crop in zeros: (M, C, p, p) -> the same shape.

    `place` (M, 2) in [0, 1) selects which part of each patch is kept, vertically and horizontally. With 0, the crop
    begins at the top or left border of the patch.
    """
    side = x.shape[-1]
    offset = (place * (margin + 1)).long()  # (M, 2), 0 to margin
    target = torch.arange(side, device=x.device) - margin // 2
    inside = (target >= 0) & (target < side - margin)
    source = (target + offset[..., None]).clamp(0, side - 1)  # (M, 2, p)
    rows = source[:, 0, None, :, None].expand(-1, x.shape[1], -1, side)
    columns = source[:, 1, None, None, :].expand(-1, x.shape[1], side, -1)
    return x.gather(2, rows).gather(3, columns) * (inside[:, None] & inside)
