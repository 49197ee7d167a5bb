"""DINOv2: iBOT with a KoLeo regularizer, Sinkhorn-Knopp centering and layer-wise learning rates.

Oquab et al. 2024  https://arxiv.org/abs/2304.07193   conf/method/dinov2.yaml

Official code: dinov2/train/ssl_meta_arch.py, dinov2/loss/ and dinov2/utils/param_groups.py of facebookresearch/dinov2.

Shapes: N images per process, W processes, P patches of a global view, K prototypes, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather_with_grad, all_reduce_mean, rank
from sslcli.errors import check_positive
from sslcli.methods.base import GroupOptions, num_features
from sslcli.methods.dino import NUM_GLOBAL
from sslcli.methods.ibot import IBOT
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.masks import BLOCKS, block_mask, spread_limit, spread_ratios
from sslcli.nn.modes import full_precision
from sslcli.nn.prototype_head import PrototypeHead
from sslcli.nn.schedule import linear
from sslcli.nn.sinkhorn import sinkhorn

CENTERINGS = ("center", "sinkhorn")
EPSILON = 1e-8  # dinov2/loss/koleo_loss.py


def koleo(tokens: Tensor) -> Tensor:
    """Return minus the mean logarithm of the distance to the nearest neighbor (Sablayrolles et al. 2019, eq. 2).

    `tokens` (N, D) are normalized in this function. The neighbor is searched among the rows of all processes, without
    gradient. The loss is computed in float32 (float64 for float64 inputs), as the mean over the rows of this process.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = F.normalize(full_precision(tokens), dim=1, eps=EPSILON)
        everyone = all_gather_with_grad(tokens)  # (W N, D)
        with torch.no_grad():
            similarity = tokens @ everyone.T
            own = rank() * len(tokens) + torch.arange(len(tokens), device=tokens.device)
            nearest = similarity.scatter(1, own[:, None], -1.0).argmax(1)
        distance = F.pairwise_distance(tokens, everyone.index_select(0, nearest), eps=EPSILON)
        return -torch.log(distance + EPSILON).mean()


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a backbone's parameter, for layer-wise learning rates: 0 to depth + 1.

    Tokens, positions and the patch embedding are layer 0, block i is layer i + 1, and the rest is layer depth + 1.
    """
    first, *rest = name.split(".")
    if first == "blocks":
        return int(rest[0]) + 1
    return 0 if first in ("cls_token", "pos_embed", "mask_token", "reg_token", "patch_embed") else depth + 1


def lr_multiplier(name: str, *, depth: int, layer_decay: float, patch_embed_lr: float) -> float:
    """Return the factor of the learning rate of a backbone's parameter, see `DINOv2`."""
    factor = layer_decay ** (depth + 1 - layer_of(name, depth))
    return factor * (patch_embed_lr if name.startswith("patch_embed.") else 1.0)


class DINOv2(IBOT):
    """Self-distillation of class tokens and masked patches.

    Args:
        centering: "sinkhorn" computes the targets with Sinkhorn-Knopp, and "center" with centers, as in DINO and iBOT.
        koleo_weight: weight of the KoLeo regularizer, which spreads the class tokens of a batch.
        mask_fraction: fraction of the global views of a batch with masked patches.
        mask_range: the mask ratios of these views are spread evenly over this range.
        layer_decay: factor of the learning rate from a layer of the backbone to the layer below it.
        patch_embed_lr: factor of the learning rate of the patch embedding, in addition to `layer_decay`.
        separate_heads: use another head, `patch_head`, for patches, as the released ViT-L/14 and ViT-g/14.
        patch_num_prototypes: number of prototypes of `patch_head`. None = `num_prototypes`.
        patch_dim: width of the bottleneck of `patch_head`. None = `dim`.

    The other arguments are those of `IBOT`. The temperature increases in every step, and not in every epoch as in DINO.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        num_prototypes: int = 65536,
        dim: int = 256,
        hidden: int = 2048,
        layers: int = 3,
        num_views: int = 10,
        freeze_last_layer_epochs: float = 1,
        momentum: float = 0.992,
        final_momentum: float = 1.0,
        temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_temperature_epochs: int = 30,
        centering: str = "sinkhorn",
        center_momentum: float = 0.9,
        class_weight: float = 1.0,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        mask_fraction: float = 0.5,
        mask_range: tuple[float, float] = (0.1, 0.5),
        layer_decay: float = 0.9,
        patch_embed_lr: float = 0.2,
        separate_heads: bool = False,
        patch_num_prototypes: int | None = None,
        patch_dim: int | None = None,
    ) -> None:
        if centering not in CENTERINGS:
            raise ValueError(f"centering is {centering!r}, but it must be one of {', '.join(CENTERINGS)}")
        low, high = mask_range
        if not (0 <= mask_fraction <= 1 and 0 < low <= high < 1):
            raise ValueError(
                f"mask_fraction is {mask_fraction} and mask_range is {list(mask_range)}, but mask_fraction must be in "
                "[0, 1], and mask_range a range within (0, 1)"
            )
        if not (0 < layer_decay <= 1 and patch_embed_lr > 0):
            raise ValueError(
                f"layer_decay is {layer_decay} and patch_embed_lr is {patch_embed_lr}, but layer_decay must be in "
                "(0, 1], and patch_embed_lr positive"
            )
        if not separate_heads and (patch_num_prototypes is not None or patch_dim is not None):
            raise ValueError(
                f"patch_num_prototypes is {patch_num_prototypes} and patch_dim is {patch_dim}, but patches share the "
                "head of class tokens: set separate_heads=true, or both to null"
            )
        patch_num_prototypes = num_prototypes if patch_num_prototypes is None else patch_num_prototypes
        patch_dim = dim if patch_dim is None else patch_dim
        check_positive(patch_num_prototypes=patch_num_prototypes, patch_dim=patch_dim)
        super().__init__(
            backbone,
            image_size=image_size,
            num_prototypes=num_prototypes,
            dim=dim,
            hidden=hidden,
            layers=layers,
            num_views=num_views,
            trained_gain=True,
            freeze_last_layer_epochs=freeze_last_layer_epochs,
            momentum=momentum,
            final_momentum=final_momentum,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            warmup_teacher_temperature=warmup_teacher_temperature,
            warmup_teacher_temperature_epochs=warmup_teacher_temperature_epochs,
            patch_teacher_temperature=teacher_temperature,
            warmup_patch_teacher_temperature=warmup_teacher_temperature,
            center_momentum=center_momentum,
            patch_center_momentum=center_momentum,
            class_weight=class_weight,
            patch_weight=patch_weight,
        )
        self.uses_sinkhorn = centering == "sinkhorn"
        self.koleo_weight = koleo_weight
        self.mask_fraction, self.mask_range = mask_fraction, (low, high)
        self.layer_decay, self.patch_embed_lr = layer_decay, patch_embed_lr
        self.patch_head: PrototypeHead | None = None
        self.teacher_patch_head: PrototypeHead | None = None
        if separate_heads:
            self.patch_head = PrototypeHead(
                num_features(backbone),
                hidden=hidden,
                dim=patch_dim,
                num_prototypes=patch_num_prototypes,
                layers=layers,
                trained_gain=True,
            )
            self.teacher_patch_head = frozen_copy(self.patch_head)
            self.register_buffer("patch_center", torch.zeros(patch_num_prototypes))

    def before_step(self, progress: float, epoch: float) -> None:
        start, end, epochs = self.temperatures
        temperature = linear(epoch, start=start, end=end, length=epochs)
        self.current_teacher_temperature.fill_(temperature)
        self.current_patch_teacher_temperature.fill_(temperature)

    def draw_masks(self, count: int, device: torch.device) -> Tensor:
        """Draw the masks of both global views of `count` images: (2, count, P) bool, True = masked."""
        low, high = self.mask_range
        size = NUM_GLOBAL * count
        ratios = spread_ratios(self.noise, size, low=low, high=high, fraction=self.mask_fraction, device=device)
        blocks = self.noise.uniform(size, BLOCKS, 4, device=device)
        num_patches = self.grid[0] * self.grid[1]
        targets = (ratios * num_patches).floor()
        mask = block_mask(blocks, targets, self.grid, smallest=4, largest=num_patches / 2)
        mask &= mask.flatten().cumsum(0).view(mask.shape) <= self.most_masked(size)  # as good as never False
        return mask.view(count, NUM_GLOBAL, -1).transpose(0, 1)  # the views of an image have neighboring numbers

    def most_masked(self, num_views: int) -> int:
        """Return the largest number of masked patches in the `num_views` global views of this process."""
        low, high = self.mask_range
        patches = self.grid[0] * self.grid[1]
        return spread_limit(num_views, patches, low=low, high=high, fraction=self.mask_fraction)

    def places(self, mask: Tensor) -> Tensor:
        """Return the rows (M,) of the masked patches, and of as many others as are needed for a constant M."""
        masked_first = mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        return masked_first[: max(1, self.most_masked(mask[..., 0].numel()))]

    def student_logits(self, class_tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.patch_head is None:
            return super().student_logits(class_tokens, patches)
        bottleneck = self.head.bottleneck(class_tokens)
        return bottleneck, full_precision(self.head.last_layer(bottleneck)), full_precision(self.patch_head(patches))

    def teacher_head_logits(self, class_tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        if self.teacher_patch_head is None:
            return super().teacher_head_logits(class_tokens, patches)
        return full_precision(self.teacher_head(class_tokens)), full_precision(self.teacher_patch_head(patches))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        if self.patch_head is not None and self.teacher_patch_head is not None:
            ema_update(self.teacher_patch_head, self.patch_head, self.scheduled(progress)["EMA momentum"])

    def class_target(self, teacher: Tensor) -> Tensor:
        if not self.uses_sinkhorn:
            return super().class_target(teacher)
        rows = sinkhorn(teacher.flatten(0, 1), temperature=self.current_teacher_temperature)
        return rows.view(teacher.shape)

    def patch_target(self, teacher: Tensor, masked: Tensor) -> Tensor:
        if not self.uses_sinkhorn:
            return super().patch_target(teacher, masked)
        return sinkhorn(teacher, temperature=self.current_patch_teacher_temperature, counted=masked)

    def mean_patch(self, teacher: Tensor, masked: Tensor) -> Tensor:
        """Return the mean of the teacher's logits of masked patches over all processes: (M, K) -> (K,)."""
        weight = masked.to(teacher.dtype)[:, None]
        total = all_reduce_mean(torch.cat([(teacher * weight).sum(0), weight.sum()[None]]))
        return total[:-1] / total[-1].clamp(min=1e-12)

    def further_terms(self, class_tokens: Tensor) -> dict[str, Tensor]:
        if not self.koleo_weight:
            return {}
        return {"koleo": self.koleo_weight * torch.stack([koleo(view) for view in class_tokens]).sum()}

    def group_options(self) -> dict[str, GroupOptions]:
        options = super().group_options()
        names = [name for name, _ in self.backbone.named_parameters()]
        depth = 1 + max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1)
        for name in [*(f"backbone.{name}" for name in names), "mask_token"]:
            scale = lr_multiplier(
                name.removeprefix("backbone."),
                depth=depth,
                layer_decay=self.layer_decay,
                patch_embed_lr=self.patch_embed_lr,
            )
            options[name] = {"lr_scale": scale}
        if self.patch_head is not None:
            options["patch_head.last_layer"] = options["head.last_layer"]
        return options

    def effective(self, batch_size: int) -> dict[str, Any]:
        heads = {} if self.patch_head is None else {"heads": "separate heads of class tokens and patches"}
        return super().effective(batch_size) | {"centering": CENTERINGS[self.uses_sinkhorn]} | heads
