"""CPC: prediction of the encodings of image patches from the patches above them, with a contrastive loss.

v1  van den Oord, Li, Vinyals 2018  https://arxiv.org/abs/1807.03748  conf/method/cpc.yaml
v2  Henaff et al. 2020              https://arxiv.org/abs/1905.09272  conf/method/cpc_v2.yaml

In v2, all other patches are negatives, and each patch is augmented independently. Predictions are made in four
directions: from top to bottom, and likewise after the grid is rotated by 90, 180 and 270 degrees.

Shapes: N images per process, W processes, p pixels per patch side, g x g patches per image (the grid), D encoding size,
E context size, M negatives. The contexts of one row of the grid predict the row that is `offset` rows lower. Only the
first R = g - offset rows of the grid have such a target row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslcli.distributed.collectives import world_size
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features
from sslcli.methods.cpc_context import context_network
from sslcli.methods.cpc_losses import full_contrast, sampled_contrast
from sslcli.methods.cpc_patches import (
    SMALLEST_PATCH,
    PatchAugmentation,
    gray,
    patch_size,
    patchify,
    refuse_batch_norm,
    row_offsets,
)
from sslcli.nn.contrastive import Contrast
from sslcli.nn.noise import Noise


class PatchPrediction(Method):
    """Base class of CPC v1 and v2. It computes patches, encodings, and contexts in one to four directions.

    The context of a patch is a vector that summarizes the encodings of patches in the row of this patch and in the rows
    above it. It predicts the encodings of patches in lower rows.

    Args:
        image_size: side of the training images in pixels.
        grid: g, the number of patches per side. None selects g from image_size and min_patch_size. Patches overlap by
            half.
        min_patch_size: minimum patch side in pixels with grid=None. In small images, patches may be smaller, see
            `patch_size`.
        context: name of the context network: gru, pixelcnn_gated or pixelcnn_v2.
        hidden: channels of the context network's hidden layers.
        steps: number of rows that are predicted from one context. None predicts all rows below the skipped rows.
        skip: number of rows directly below the row of a context that are not predicted. The patches of
            adjacent rows share half of their pixels. None skips 2 rows as in CPC v2, or 1 row if g is 3.
        directions: number of directions, 1 to 4. The first direction predicts from top to bottom. For each further
            direction, the grid is rotated by 90 degrees. All directions share the context network. Each direction has
            its own prediction layers.
        augmentation: augmentation that is applied to each patch independently, or None.
        grayscale: True converts every color image to gray, in training and in `features`. The number of channels does
            not change.

    Raises ValueError if the backbone has BatchNorm, or if the arguments are incompatible.
    """

    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        grid: int | None,
        min_patch_size: int,
        context: str,
        hidden: int,
        steps: int | None,
        skip: int | None,
        directions: int,
        augmentation: PatchAugmentation | None,
        grayscale: bool,
    ) -> None:
        super().__init__(backbone)
        check_positive(hidden=hidden)
        refuse_batch_norm(backbone)
        self.patch = patch_size(image_size, grid, min_patch_size=min_patch_size)
        self.grid = 2 * image_size // self.patch - 1
        self.offsets = row_offsets(steps, skip=skip, grid=self.grid)
        if directions not in (1, 2, 3, 4):
            raise ValueError(f"directions is {directions}, but a grid can be read in 1, 2, 3 or 4 directions")
        self.directions = directions
        self.augmentation = augmentation
        self.grayscale = grayscale
        self.noise = Noise()
        self.dim = num_features(backbone)
        self.context = context_network(context, self.dim, hidden)

    def predictors(self, in_features: int, out_features: int, *, bias: bool) -> nn.ModuleList:
        """Return one linear layer per direction and offset, sorted by direction first and by offset second.

        An offset is the distance in rows between a context and the patch that it predicts.
        """
        count = self.directions * len(self.offsets)
        return nn.ModuleList(nn.Linear(in_features, out_features, bias=bias) for _ in range(count))

    def of_direction(self, predictors: nn.ModuleList, direction: int) -> list[tuple[int, nn.Module]]:
        """Return the linear layers of one direction, as one pair (offset, linear layer) per offset.

        `predictors` contains the linear layers of all directions. `direction` is the number of 90-degree rotations of
        the grid. The layer of an offset predicts the patch that is `offset` rows below the patch of the context.
        """
        first = direction * len(self.offsets)
        return list(zip(self.offsets, predictors[first : first + len(self.offsets)], strict=True))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        patches = self.patches(images)
        if self.augmentation is not None:
            patches = self.augmentation(patches, self.noise)
        z = self.encode(patches)
        self.embeddings = (z.detach().mean((1, 2)),)
        rows = self.grid - self.offsets[0]  # R of the smallest offset; contexts do not depend on the rows below
        found: list[Contrast] = []
        for direction in range(self.directions):
            turned = torch.rot90(z, -direction, (1, 2))  # rotates targets and contexts together
            context = self.context(turned[:, :rows].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (N, R, g, E)
            found += self.contrasts(context, turned, direction)
        losses, accuracies = (torch.stack(values) for values in zip(*found, strict=True))
        return {"loss": self.total(losses), "accuracy": accuracies.mean()}

    def check_views(self, views: list[Tensor]) -> None:
        patches = patchify(views[0], self.patch)
        if patches.shape[1] != self.grid:
            raise ValueError(
                f"the view has {views[0].shape[-1]} pixels, but the grid is for images of "
                f"{self.patch * (self.grid + 1) // 2}: set views.views.0.size to null"
            )
        try:
            self.encode(patches)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the backbone {type(self.backbone).__name__} does not accept patches of {self.patch} pixels "
                f"({error}): use a larger dataset.image_size, a smaller method.grid, or backbone=small_layernorm"
            ) from error

    def patches(self, images: Tensor) -> Tensor:
        """Return the g x g patches of each image, (N, C, S, S) -> (N, g, g, C, p, p). A patch has p x p pixels.

        If `grayscale` is True, color images are converted to gray first. The number of channels C does not change.
        """
        if self.grayscale and images.shape[1] == 3:
            images = gray(images).expand_as(images)
        return patchify(images, self.patch)

    def encode(self, patches: Tensor) -> Tensor:
        """Encode each patch independently: (N, g, g, C, p, p) -> (N, g, g, D)."""
        flat = patches.flatten(0, 2).contiguous(memory_format=torch.channels_last)
        return self.backbone(flat).view(*patches.shape[:3], -1)  # type: ignore[no-any-return]

    def contrasts(self, context: Tensor, z: Tensor, direction: int) -> list[Contrast]:
        """Return one `Contrast` per offset for one direction.

        The patches of an image are a grid of g rows and g columns. A context predicts the encoding of another patch,
        its target. An offset is the number of rows from a context down to its target.

        Args:
            context: (N, R, g, E), the contexts of size E. R is the number of rows that have a target at the smallest
                offset. These are the first R rows of the grid.
            z: (N, g, g, D), the encodings of size D of all patches.
            direction: number of 90-degree rotations of the grid. `context` and `z` are already rotated.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define contrasts")

    def total(self, losses: Tensor) -> Tensor:
        """Reduce the losses of all offsets and directions to a scalar; by default, their mean."""
        return losses.mean()

    def features(self, images: Tensor) -> Tensor:
        """Return the mean encoding over the grid: (N, C, S, S) -> (N, D).

        The backbone is trained only on patches, so images are also divided into patches here. The number of patches
        depends on S. The context network is not used.
        """
        return self.encode(self.patches(images)).mean((1, 2))

    def effective(self, batch_size: int) -> dict[str, Any]:
        rows = f"{self.offsets[0]} to {self.offsets[-1]}" if len(self.offsets) > 1 else str(self.offsets[0])
        return super().effective(batch_size) | {
            "patches": f"{self.grid} x {self.grid} of {self.patch} pixels",
            "predicted row offsets": rows,
        }


class CPC(PatchPrediction):
    """CPC v1: the target of each prediction is contrasted with `negatives` targets that are drawn at random.

    A context belongs to a patch. Its target is computed from the patch a fixed number of rows (the offset) below. The
    negatives of a prediction are drawn from all targets with the same offset.

    In addition to the arguments of `PatchPrediction`:
        negatives: M, the number of negatives per prediction. They are drawn with replacement from the targets of all
            processes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        grid: int | None = None,
        min_patch_size: int = SMALLEST_PATCH,
        context: str = "pixelcnn_gated",
        hidden: int = 256,
        steps: int | None = None,
        skip: int | None = 1,
        negatives: int = 16,
        directions: int = 1,
        augmentation: PatchAugmentation | None = None,
        grayscale: bool = False,
    ) -> None:
        check_positive(negatives=negatives)
        super().__init__(
            backbone,
            image_size=image_size,
            grid=grid,
            min_patch_size=min_patch_size,
            context=context,
            hidden=hidden,
            steps=steps,
            skip=skip,
            directions=directions,
            augmentation=augmentation,
            grayscale=grayscale,
        )
        self.negatives = negatives
        self.predict = self.predictors(self.dim, self.context.out_channels, bias=False)

    def contrasts(self, context: Tensor, z: Tensor, direction: int) -> list[Contrast]:
        found = []
        for offset, predict in self.of_direction(self.predict, direction):
            targets = predict(z[:, offset:])  # (N, R, g, E)
            num_images, rows, columns = targets.shape[:3]
            places = world_size() * num_images * rows * columns
            shape = (num_images, rows, columns, self.negatives)
            negative = self.noise.integers(places, *shape, device=z.device)
            found.append(sampled_contrast(context[:, :rows], targets, negative))
        return found

    def num_negatives(self, batch_size: int) -> int:
        return self.negatives


class CPCv2(PatchPrediction):
    """CPC v2: each target is contrasted with all other patches of all images of the step.

    In addition to the arguments of `PatchPrediction`:
        dim: size of the vectors to which contexts and encodings are projected. The projected vectors are compared.
        scale: the predictions are multiplied by this value. With 0.1, the initial softmax is nearly uniform.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        grid: int | None = None,
        min_patch_size: int = SMALLEST_PATCH,
        context: str = "pixelcnn_v2",
        hidden: int = 256,
        steps: int | None = 1,
        skip: int | None = 2,
        dim: int = 64,
        scale: float = 0.1,
        directions: int = 4,
        augmentation: PatchAugmentation | None = None,
        grayscale: bool = False,
    ) -> None:
        check_positive(dim=dim)
        if not scale > 0:
            raise ValueError(f"scale is {scale}, but it multiplies the predictions, so it must be positive")
        super().__init__(
            backbone,
            image_size=image_size,
            grid=grid,
            min_patch_size=min_patch_size,
            context=context,
            hidden=hidden,
            steps=steps,
            skip=skip,
            directions=directions,
            augmentation=augmentation,
            grayscale=grayscale,
        )
        self.scale = scale
        self.target = nn.Linear(
            self.dim, dim, bias=False
        )  # a bias would add the same constant to all logits of a prediction
        self.predict = self.predictors(self.context.out_channels, dim, bias=True)

    def contrasts(self, context: Tensor, z: Tensor, direction: int) -> list[Contrast]:
        targets, found = self.target(z), []
        for offset, predict in self.of_direction(self.predict, direction):
            prediction = self.scale * predict(context[:, : self.grid - offset])
            found.append(full_contrast(prediction, targets, offset=offset))
        return found

    def total(self, losses: Tensor) -> Tensor:
        return losses.sum()

    def num_negatives(self, batch_size: int) -> int:
        return batch_size * self.grid**2 - 1
