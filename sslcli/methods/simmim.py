"""SimMIM: a vision transformer sees all patches, masked ones as a mask token, and one linear layer predicts the pixels.

Xie et al. 2022  https://arxiv.org/abs/2111.09886   conf/method/simmim.yaml

Shapes: N images per process, C channels, p pixels per patch side, P patches per image, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.methods.base import Batch, Method, num_features, token_backbone
from sslcli.methods.mae import PICTURE_SEED, check_size, masked_rows, patchify, side_of_patches
from sslcli.nn.masks import cell_mask
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise


def masked_l1(prediction: Tensor, images: Tensor, mask: Tensor, *, patch_size: int) -> Tensor:
    """Return the mean absolute error of the masked pixels of images (N, C, H, W).

    `mask` is (N, H / p, W / p), 1 or True for masked patches, at least one of them. The official code adds 1e-5 to the
    number of masked pixels. Without it, two processes compute the loss of one. The error is computed in float32, or in
    float64 if the input is float64.
    """
    error = (full_precision(prediction) - full_precision(images)).abs()
    hidden = mask.to(error.dtype).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]
    return (error * hidden).sum() / (hidden.sum() * images.shape[1])


class SimMIM(Method):
    """Prediction of masked pixels for backbones with patch tokens.

    Args:
        image_size: side of the images in pixels.
        channels: image channels C.
        backbone_pool: not used here. The configurations of vision transformers use it as the default of
            `backbone.pool`.
        mask_ratio: fraction of masked cells, above 0 and at most 1.
        cell_size: side of a mask cell in pixels, a multiple of the patch size that divides `image_size`. None selects
            two patches, or one patch if the image has an odd number of patches per side.

    Raises ValueError if an argument is out of range, or if the backbone has no patch tokens.
    """

    num_views = 1
    backbone: Backbone

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        backbone_pool: str = "mean",
        mask_ratio: float = 0.6,
        cell_size: int | None = None,
    ) -> None:
        super().__init__(token_backbone(backbone))
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask_ratio is {mask_ratio}, but it must be above 0 and at most 1; SimMIM uses 0.6")
        self.patch_size = side_of_patches(self.backbone)
        side = image_size // self.patch_size
        if cell_size is None:
            cell_size = self.patch_size * (1 if side % 2 else 2)
        if cell_size < 1 or cell_size % self.patch_size or image_size % cell_size:
            raise ValueError(
                f"cell_size is {cell_size}, but it must be a multiple of the patch size {self.patch_size} and divide "
                f"the {image_size} pixels of a side; null selects it automatically"
            )
        self.grid, self.cell, self.mask_ratio = (side, side), cell_size // self.patch_size, mask_ratio
        width = num_features(backbone)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Conv2d(width, self.patch_size**2 * channels, 1)
        self.noise = Noise()

    @property
    def num_cells(self) -> int:
        return (self.grid[0] // self.cell) * (self.grid[1] // self.cell)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        numbers = self.noise.uniform(len(images), self.num_cells, device=images.device)
        mask = cell_mask(numbers, self.grid, cell=self.cell, ratio=self.mask_ratio)
        patches = self.encode(images, mask)
        self.embeddings = (patches.detach().mean(1),)
        prediction = self.decode(patches)
        return {"loss": masked_l1(prediction, images, mask.view(-1, *self.grid), patch_size=self.patch_size)}

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the patch tokens (N, P, D) of images whose patches are masked where `mask` (N, P) is True."""
        tokens, _ = self.backbone.tokens(images, mask=mask, mask_token=self.mask_token)
        return tokens[:, self.backbone.num_prefix_tokens :]

    def decode(self, patches: Tensor) -> Tensor:
        """Return predicted images: (N, P, D) -> (N, C, H, W)."""
        maps = patches.mT.reshape(len(patches), -1, *self.grid)
        return F.pixel_shuffle(self.decoder(maps), self.patch_size)

    def check_views(self, views: list[Tensor]) -> None:
        check_size(views[0], self.grid, self.patch_size)

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        generator = torch.Generator().manual_seed(PICTURE_SEED)
        numbers = torch.rand(len(images), self.num_cells, generator=generator).to(images.device)
        mask = cell_mask(numbers, self.grid, cell=self.cell, ratio=self.mask_ratio)
        prediction = patchify(full_precision(self.decode(self.encode(images, mask))), self.patch_size)
        return {"reconstruction": masked_rows(images, prediction, mask, self.grid, self.patch_size)}

    def effective(self, batch_size: int) -> dict[str, Any]:
        return super().effective(batch_size) | {
            "patches": f"{self.grid[0]} x {self.grid[1]} of {self.patch_size} pixels",
            "masked cells": f"{math.ceil(self.mask_ratio * self.num_cells)} of {self.num_cells}, "
            f"{self.cell * self.patch_size} pixels per side",
        }
