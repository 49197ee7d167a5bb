"""I-JEPA: prediction of the teacher's patch features in blocks that the student does not see.

Assran et al. 2023  https://arxiv.org/abs/2301.08243   conf/method/ijepa.yaml

Official code: src/train.py, src/masks/multiblock.py and src/models/vision_transformer.py of facebookresearch/ijepa.

Shapes: N images per process, P patches, K patches of the context, B target blocks of T patches, D width, E predictor
width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.backbones.vit import VisionTransformer, position_embedding
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features, token_backbone
from sslcli.methods.mae import check_size, side_of_patches
from sslcli.nn.contrastive import check_momentum
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.masks import multiblock_masks, take_patches
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise
from sslcli.nn.schedule import linear
from sslcli.nn.transformer import Block


class Predictor(nn.Module):
    """Transformer from the tokens of a context to the features of target blocks, one sequence per block.

    Args:
        width: width D of the tokens.
        grid: rows and columns of patches.
        dim: predictor width E, divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
    """

    pos_embed: Tensor  # (P, E)

    def __init__(self, width: int, *, grid: tuple[int, int], dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        # The official positions have the columns in the first half of the channels, and the rows in the second half.
        self.register_buffer("pos_embed", position_embedding(*grid, dim).roll(dim // 2, 1), persistent=False)
        self.blocks = nn.Sequential(*(Block(dim, num_heads=num_heads, hidden=4 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, width)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """Return the predicted features of all target blocks, (B, N, T, D).

        Args:
            context: (N, K, D), tokens of the context.
            places: (N, K) int64, patch indices of the context.
            targets: (B, N, T) int64, patch indices of the target blocks.
        """
        x = self.embed(context) + self.pos_embed[places]
        queries = self.mask_token + self.pos_embed[targets.flatten(0, 1)]  # (B N, T, E)
        x = torch.cat([x.repeat(len(targets), 1, 1), queries.to(x.dtype)], dim=1)
        x = self.norm(self.blocks(x))[:, context.shape[1] :]
        return self.predict(x).view(*targets.shape, -1)  # type: ignore[no-any-return]


def target_features(tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the normalized features of the target blocks, (B, N, T, D).

    `tokens` (N, P, D) are the teacher's patch tokens. Each token is normalized to mean 0 and variance 1. `targets` (B,
    N, T) are the patch indices of the blocks.
    """
    normalized = F.layer_norm(full_precision(tokens), tokens.shape[2:])
    return take_patches(normalized, targets).view(*targets.shape, -1)


class IJEPA(Method):
    """Image-based joint-embedding predictive architecture. The teacher is a moving average of the student.

    Args:
        image_size: side of the images in pixels. `ssl-train` sets it.
        backbone_pool: "mean". The configurations of vision transformers use it as the default of `backbone.pool`.
        predictor_dim: width E of the predictor, divisible by 4 and by `predictor_heads`.
        predictor_depth: number of blocks of the predictor.
        predictor_heads: attention heads of the predictor.
        num_targets: number B of target blocks per image.
        target_scale: range of the area of a target block, as a fraction of the image.
        target_aspect: range of height / width of a target block.
        context_scale: range of the area of the context block, from which the target blocks are removed.
        min_context: a context should have more patches than this.
        momentum: initial momentum of the teacher.
        final_momentum: momentum at the end of the run. The momentum increases to it linearly.

    Raises ValueError if an argument is out of range, if the backbone has no patch tokens, or if its features are the
    class token, which the loss does not train.
    """

    num_views = 1
    has_varying_shapes = True
    evaluated_part = "teacher"
    backbone: Backbone
    teacher: Backbone

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        backbone_pool: str = "mean",
        predictor_dim: int = 384,
        predictor_depth: int = 6,
        predictor_heads: int = 12,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_context: int = 10,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
    ) -> None:
        super().__init__(token_backbone(backbone))
        check_positive(
            predictor_dim=predictor_dim,
            predictor_depth=predictor_depth,
            predictor_heads=predictor_heads,
            num_targets=num_targets,
        )
        check_momentum(momentum, final_momentum)
        if backbone_pool != "mean" or (isinstance(backbone, VisionTransformer) and backbone.pool != "mean"):
            raise ValueError(
                "the features of the backbone are its class token, which I-JEPA does not train: set backbone.pool=mean"
            )
        if predictor_dim % 4 or predictor_dim % predictor_heads:
            raise ValueError(
                f"predictor_dim is {predictor_dim}, but it must be divisible by 4 (for the position embedding) and by "
                f"predictor_heads={predictor_heads}"
            )
        for name, (low, high) in {"target_scale": target_scale, "context_scale": context_scale}.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} is {[low, high]}, but it must be a range within (0, 1]")
        self.patch_size = side_of_patches(self.backbone)
        side = image_size // self.patch_size
        if side < 4:
            raise ValueError(
                f"the images have {side} x {side} patches, but blocks need at least 4 x 4: set backbone.patch_size to "
                f"{max(1, image_size // 8)} or less"
            )
        self.grid = (side, side)
        self.predictor = Predictor(
            num_features(backbone), grid=self.grid, dim=predictor_dim, depth=predictor_depth, num_heads=predictor_heads
        )
        self.teacher = frozen_copy(self.backbone)
        self.masks: dict[str, Any] = {
            "num_targets": num_targets,
            "target_scale": tuple(target_scale),
            "target_aspect": tuple(target_aspect),
            "context_scale": tuple(context_scale),
            "min_context": min_context,
        }
        self.momentum, self.final_momentum = momentum, final_momentum
        self.noise = Noise()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        masks = multiblock_masks(self.noise, len(images), self.grid, device=images.device, **self.masks)
        prefix = self.backbone.num_prefix_tokens
        with torch.no_grad():
            target = target_features(self.teacher.tokens(images)[0][:, prefix:], masks.targets)  # (B, N, T, D)
        context = self.backbone.tokens(images, keep=masks.context)[0][:, prefix:]  # (N, K, D)
        prediction = self.predictor(context, masks.context, masks.targets)
        self.embeddings = (context.detach().mean(1),)
        return {"loss": F.smooth_l1_loss(full_precision(prediction), target)}

    def scheduled(self, progress: float) -> dict[str, float]:
        return {"EMA momentum": linear(progress, start=self.momentum, end=self.final_momentum, length=1.0)}

    def after_step(self, progress: float) -> None:
        ema_update(self.teacher, self.backbone, self.scheduled(progress)["EMA momentum"])

    def check_views(self, views: list[Tensor]) -> None:
        check_size(views[0], self.grid, self.patch_size)

    def effective(self, batch_size: int) -> dict[str, Any]:
        return super().effective(batch_size) | {
            "patches": f"{self.grid[0]} x {self.grid[1]} of {self.patch_size} pixels"
        }
