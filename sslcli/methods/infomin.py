"""InfoMin: MoCo v2 with stronger views and a second query from shuffled patches of the image (PIRL).

InfoMin  Tian et al. 2020           https://arxiv.org/abs/2005.10243   conf/method/infomin.yaml
PIRL     Misra, van der Maaten 2020 https://arxiv.org/abs/1912.01991   the jigsaw branch

Shapes: N images per process, W processes, D embedding size, K queue length, F features. An image is divided into 9
cells. The shuffled patches from these cells are a jigsaw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.methods.base import Batch, num_features
from sslcli.methods.moco import MoCo, projection_head
from sslcli.nn.batch_norm import SplitBatchNorm
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise

GRID = 3
CELLS = GRID * GRID


def cells_of(images: Tensor) -> Tensor:
    """Divide images into 3 x 3 cells, row by row: (N, C, S, S) -> (N, 9, C, S / 3, S / 3).

    Raises ValueError if S is not a multiple of 3.
    """
    height, width = images.shape[2:]
    if height != width or height % GRID:
        raise ValueError(
            f"the jigsaw view has {height} x {width} pixels, but it is divided into {GRID} x {GRID} cells: "
            f"set views.views.1.size to a multiple of {GRID}"
        )
    side = height // GRID
    grid = images.unfold(2, side, side).unfold(3, side, side)  # (N, C, 3, 3, s, s)
    return grid.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def crops_of(cells: Tensor, corner: Tensor, side: int) -> Tensor:
    """Crop a square of `side` pixels from each cell: `cells` (N, 9, C, s, s) -> (N, 9, C, side, side).

    The cells are the 3 x 3 parts of an image, each with a side of s pixels. `corner` (N, 9, 2) holds the top and left
    coordinates of each square in its cell.
    """
    channels, height = cells.shape[2:4]
    place = corner[..., None] + torch.arange(side, device=cells.device)  # (N, 9, 2, side)
    rows = place[:, :, 0, None, :, None].expand(-1, -1, channels, -1, height)
    columns = place[:, :, 1, None, None, :].expand(-1, -1, channels, side, -1)
    return cells.gather(3, rows).gather(4, columns)


class InfoMin(MoCo):
    """Momentum contrast with two queries per key: the whole image and its shuffled patches.

    Args:
        jigsaw_weight: beta in [0, 1]. The loss is (1 - beta) * MoCo loss + beta * jigsaw loss. 0 disables the jigsaw
            branch, and the method is then identical to MoCo and takes two views.
        jigsaw_patch: side of a patch as a fraction of the side of its cell, in (0, 1]. The image is divided into 3 x 3
            cells. One patch is cropped from each cell, at a random position.
        moco: the arguments of `MoCo`.

    The query is computed from the first view and the key from the second view. With the jigsaw branch, the patches of
    the second query are cropped from a third view. The side of the third view must be a multiple of 3.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 128,
        mlp_head: bool = True,
        hidden: int | None = None,
        jigsaw_weight: float = 0.5,
        jigsaw_patch: float = 64 / 85,
        **moco: Any,
    ) -> None:
        super().__init__(backbone, dim=dim, mlp_head=mlp_head, hidden=hidden, **moco)
        if not 0 <= jigsaw_weight <= 1:
            raise ValueError(
                f"jigsaw_weight is {jigsaw_weight}, but it is a fraction of the loss, so it must be in [0, 1]"
            )
        if not 0 < jigsaw_patch <= 1:
            raise ValueError(
                f"jigsaw_patch is {jigsaw_patch}, but it is the side of a patch as a fraction of its cell: choose a "
                "value above 0 and at most 1"
            )
        self.jigsaw_weight, self.jigsaw_patch = jigsaw_weight, jigsaw_patch
        self.num_views = 2 if jigsaw_weight == 0 else 3
        if jigsaw_weight > 0:
            self.patch_head = projection_head(num_features(self.backbone), dim, mlp_head=mlp_head, hidden=hidden)
            self.jigsaw_head = nn.Linear(CELLS * dim, dim)
            self.noise = Noise()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if self.jigsaw_weight == 0:
            return super().forward(batch)
        x1, x2, whole = batch.views
        scalars = super().forward(replace(batch, views=[x1, x2]))
        key = self.embeddings[1]  # (N, D) keys of view 2; the patches are compared with these keys too
        jigsaw = self.contrast(self.jigsaw(whole), key)
        loss = (1 - self.jigsaw_weight) * scalars["loss"] + self.jigsaw_weight * jigsaw.loss
        return scalars | {"loss": loss, "jigsaw_loss": jigsaw.loss.detach(), "jigsaw_accuracy": jigsaw.accuracy}

    def check_views(self, views: list[Tensor]) -> None:
        if self.jigsaw_weight == 0:
            return
        patches = self.patches(views[2])
        try:
            self.backbone(patches.flatten(0, 1))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the backbone {type(self.backbone).__name__} does not accept the jigsaw patches of "
                f"{patches.shape[-1]} pixels ({error}): enlarge the third view with views.views.1.size, choose another "
                "backbone, or disable the jigsaw task with views=infomin method.jigsaw_weight=0"
            ) from error

    def jigsaw(self, images: Tensor) -> Tensor:
        """Return the query of each image (unit norm) from its nine patches in random order: (N, C, S, S) -> (N, D)."""
        patches = self.patches(images)
        with self.grouped_by_image():
            features = self.backbone(patches.flatten(0, 1))  # (9N, F)
        codes = self.patch_head(features).unflatten(0, (len(images), CELLS))  # (N, 9, D)
        order = self.noise.uniform(len(images), CELLS, device=images.device).argsort(1)
        shuffled = codes.gather(1, order.unsqueeze(2).expand_as(codes))
        return F.normalize(full_precision(self.jigsaw_head(shuffled.flatten(1))), dim=1)

    def patches(self, images: Tensor) -> Tensor:
        """Crop a random patch of p x p pixels from each of 3 x 3 image cells: (N, C, S, S) -> (N, 9, C, p, p)."""
        cells = cells_of(images)
        cell = cells.shape[-1]
        side = max(1, round(self.jigsaw_patch * cell))
        corner = self.noise.integers(cell - side + 1, len(images), CELLS, 2, device=images.device)
        return crops_of(cells, corner, side)

    @contextmanager
    def grouped_by_image(self) -> Iterator[None]:
        """Multiply the group size of BatchNorm by 9 within the `with` block.

        BatchNorm normalizes groups of images. The argument `bn_group` of `MoCo` is the number of images per group. The
        jigsaw branch encodes nine patches per image. Within the block, a group contains all nine patches of `bn_group`
        images.
        """
        norms = [part for part in self.backbone.modules() if isinstance(part, SplitBatchNorm)]
        for norm in norms:
            norm.group *= CELLS
        try:
            yield
        finally:
            for norm in norms:
                norm.group //= CELLS

    def effective(self, batch_size: int) -> dict[str, Any]:
        facts = super().effective(batch_size)
        return facts | ({"patches per image": CELLS} if self.jigsaw_weight > 0 else {})
