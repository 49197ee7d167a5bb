"""iBOT: DINO, and prediction of the teacher's prototypes for masked patches.

Zhou et al. 2022  https://arxiv.org/abs/2111.07832   conf/method/ibot.yaml

Official code: main_ibot.py, loader.py and models/head.py of bytedance/ibot.

Shapes: V views, N images per process, P patches of a global view, M patches that the heads compute, K prototypes, D
width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.distributed.collectives import all_reduce_mean
from sslcli.methods.base import Batch, num_features, token_backbone
from sslcli.methods.dino import DINO, NUM_GLOBAL, centered, cross_entropy_of_views, teacher_temperature_at
from sslcli.nn.assignments import summarize
from sslcli.nn.contrastive import check_temperature
from sslcli.nn.masks import BLOCKS, block_mask, choice_of_ratios
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise


def patch_weights(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight of each patch in the loss, (2 N P,), for a mask (2, N, P) bool of both global views.

    The loss is the mean over images and views of the mean over the masked patches (eq. 2). A view without masked
    patches counts as 0.
    """
    weight = mask.to(dtype)
    return (weight / weight.sum(2, keepdim=True).clamp(min=1) / mask[..., 0].numel()).flatten()


def cross_entropy_of_patches(student: Tensor, target: Tensor, weight: Tensor, *, temperature: float) -> Tensor:
    """Return the sum of the cross-entropies of M patches, each multiplied by its weight.

    Args:
        student: (M, K), logits of the patches.
        target: (M, K), probabilities of the same patches without gradient.
        weight: (M,), see `patch_weights`.
        temperature: divisor of the student's logits.
    """
    return -(weight * (target * F.log_softmax(student / temperature, dim=1)).sum(1)).sum()


def rows_of(patches: Tensor, places: Tensor | None) -> Tensor:
    """Return the patches (2N, P, D) at `places` (M,) int64 in the order of their rows, as (M, D). None = all."""
    rows = patches.flatten(0, 1)
    return rows if places is None else rows.index_select(0, places)


class IBOT(DINO):
    """Image BERT pre-training with an online tokenizer. Class tokens and patches share the head.

    Args:
        image_size: side of the global views in pixels. `ssl-train` sets it.
        patch_teacher_temperature: divisor of the teacher's logits of patches after the warm-up.
        warmup_patch_teacher_temperature: divisor of the teacher's logits of patches in the first epoch.
        patch_center_momentum: momentum of the center of the teacher's logits of patches.
        class_weight: weight of the loss of class tokens, which is the loss of DINO.
        patch_weight: weight of the loss of masked patches.
        mask_ratios: the mask ratio of a global view is one of these numbers, ...
        mask_variations: ... changed by at most the number at the same place.

    All other arguments are those of `DINO`. Raises ValueError if the backbone has no patch tokens.
    """

    backbone: Backbone
    teacher_backbone: Backbone
    patch_center: Tensor  # (K,)
    current_patch_teacher_temperature: Tensor  # scalar

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        num_prototypes: int = 8192,
        dim: int = 256,
        hidden: int = 2048,
        layers: int = 3,
        norm: bool = False,
        num_views: int = 12,
        trained_gain: bool = False,
        freeze_last_layer_epochs: float = 1,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_temperature_epochs: int = 30,
        patch_teacher_temperature: float = 0.07,
        warmup_patch_teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
        patch_center_momentum: float = 0.9,
        class_weight: float = 1.0,
        patch_weight: float = 1.0,
        mask_ratios: tuple[float, ...] = (0.0, 0.3),
        mask_variations: tuple[float, ...] = (0.0, 0.2),
    ) -> None:
        check_masks(mask_ratios, mask_variations)
        for value in (patch_teacher_temperature, warmup_patch_teacher_temperature):
            check_temperature(value)
        super().__init__(
            token_backbone(backbone),
            num_prototypes=num_prototypes,
            dim=dim,
            hidden=hidden,
            layers=layers,
            norm=norm,
            num_views=num_views,
            trained_gain=trained_gain,
            freeze_last_layer_epochs=freeze_last_layer_epochs,
            momentum=momentum,
            final_momentum=final_momentum,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            warmup_teacher_temperature=warmup_teacher_temperature,
            warmup_teacher_temperature_epochs=warmup_teacher_temperature_epochs,
            center_momentum=center_momentum,
        )
        assert self.backbone.patch_size is not None
        side = image_size // self.backbone.patch_size
        self.grid = (side, side)
        self.class_weight, self.patch_weight = class_weight, patch_weight
        self.patch_center_momentum = patch_center_momentum
        self.mask_ratios, self.mask_variations = tuple(mask_ratios), tuple(mask_variations)
        self.patch_temperatures = (
            warmup_patch_teacher_temperature,
            patch_teacher_temperature,
            warmup_teacher_temperature_epochs,
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, num_features(backbone)))
        self.noise = Noise()
        self.register_buffer("patch_center", torch.zeros(num_prototypes))
        self.register_buffer("current_patch_teacher_temperature", torch.tensor(0.0))
        self.new_patch_centers: list[Tensor] = []  # as new_centers, for patches
        self.before_step(0.0, 0.0)

    def before_step(self, progress: float, epoch: float) -> None:
        super().before_step(progress, epoch)
        start, end, epochs = self.patch_temperatures
        temperature = teacher_temperature_at(epoch, start=start, end=end, epochs=epochs)
        self.current_patch_teacher_temperature.fill_(temperature)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views, count = batch.views, len(batch.views[0])
        mask = self.draw_masks(count, views[0].device)  # (2, N, P)
        places = self.places(mask)  # (M,) or None; below, M = 2 N P if it is None
        teacher_class, teacher_patches = self.teacher_tokens(views, places)
        tokens, _ = self.backbone.tokens(
            torch.cat(views[:NUM_GLOBAL]), mask=mask.flatten(0, 1), mask_token=self.mask_token
        )
        patches = rows_of(tokens[:, self.backbone.num_prefix_tokens :], places)  # (M, D)
        class_tokens = torch.cat([tokens[:, 0], *self.local_class_tokens(views)])  # (V N, D)
        bottleneck, student_class, student_patches = self.student_logits(class_tokens, patches)
        student_class = student_class.view(len(views), count, -1)  # (V, N, K)
        weight = patch_weights(mask, student_patches.dtype)
        weight = weight if places is None else weight.index_select(0, places)  # (M,)
        target, patch_target = self.class_target(teacher_class), self.patch_target(teacher_patches, weight > 0)
        self.embeddings = tuple(bottleneck.detach()[: NUM_GLOBAL * count].chunk(NUM_GLOBAL))
        self.new_centers.append(all_reduce_mean(teacher_class.mean((0, 1))))
        self.new_patch_centers.append(self.mean_patch(teacher_patches, weight > 0))
        whole = cross_entropy_of_views(student_class, target, temperature=self.temperature)
        parts = cross_entropy_of_patches(student_patches, patch_target, weight, temperature=self.temperature)
        further = self.further_terms(tokens[:, 0].view(NUM_GLOBAL, count, -1))
        self.assignments = summarize(target)
        entropy = self.assignments.entropy
        loss = self.class_weight * whole + self.patch_weight * parts
        return {
            "loss": sum(further.values(), loss),
            "class_loss": whole,
            "patch_loss": parts,
            **further,
            "teacher_entropy": entropy,
            "divergence": whole.detach() - entropy,
        }

    def places(self, mask: Tensor) -> Tensor | None:
        """Return the rows (M,) int64 among the 2 N P patches that the heads compute, or None for all patches.

        `mask` is (2, N, P) bool. M must be the same in every step: shapes must not depend on data on the device.
        """
        return None

    def student_logits(self, class_tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bottleneck of the class tokens, and the logits of class tokens and patches in full precision.

        Shapes: class tokens (n, D) and patches (m, D) -> (n, E) or more rows, (n, K) and (m, K).
        """
        bottleneck = self.head.bottleneck(torch.cat([class_tokens, patches]))
        logits = full_precision(self.head.last_layer(bottleneck))
        return bottleneck, logits[: len(class_tokens)], logits[len(class_tokens) :]

    def class_target(self, teacher: Tensor) -> Tensor:
        """Return the target probabilities of class tokens: logits (2, N, K) -> (2, N, K)."""
        return centered(teacher, self.center, self.current_teacher_temperature)

    def patch_target(self, teacher: Tensor, masked: Tensor) -> Tensor:
        """Return the target probabilities of patches: logits (M, K) -> (M, K). `masked` is (M,) bool."""
        return centered(teacher, self.patch_center, self.current_patch_teacher_temperature)

    def mean_patch(self, teacher: Tensor, masked: Tensor) -> Tensor:
        """Return the mean of the teacher's logits of patches over all processes: (M, K) -> (K,)."""
        return all_reduce_mean(teacher.mean(0))

    def further_terms(self, class_tokens: Tensor) -> dict[str, Tensor]:
        """Return weighted terms that are added to the loss, by name. `class_tokens` (2, N, D) are the student's."""
        return {}

    def draw_masks(self, count: int, device: torch.device) -> Tensor:
        """Draw the masks of both global views of `count` images: (2, count, P) bool, True = masked."""
        choice = self.noise.uniform(count, NUM_GLOBAL, 2, device=device).transpose(0, 1).flatten(0, 1)
        blocks = self.noise.uniform(count, NUM_GLOBAL, BLOCKS, 4, device=device).transpose(0, 1).flatten(0, 1)
        rows, columns = self.grid
        targets = choice_of_ratios(choice, self.mask_ratios, self.mask_variations) * (rows * columns)
        mask = block_mask(blocks, targets, self.grid, smallest=(min(self.grid) // 3) ** 2)
        return mask.view(NUM_GLOBAL, count, -1)

    @torch.no_grad()
    def teacher_tokens(self, views: list[Tensor], places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits of the global views: class tokens (2, N, K) and patches at `places` (M, K)."""
        tokens, _ = self.teacher_backbone.tokens(torch.cat(views[:NUM_GLOBAL]))
        patches = rows_of(tokens[:, self.teacher_backbone.num_prefix_tokens :], places)
        whole, parts = self.teacher_head_logits(tokens[:, 0], patches)
        return whole.view(NUM_GLOBAL, len(views[0]), -1), parts

    def teacher_head_logits(self, class_tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits in full precision: (n, D) -> (n, K) and (M, D) -> (M, K)."""
        logits = full_precision(self.teacher_head(torch.cat([class_tokens, patches])))
        return logits[: len(class_tokens)], logits[len(class_tokens) :]

    def local_class_tokens(self, views: list[Tensor]) -> list[Tensor]:
        """Return the student's class tokens of the local views, [(V - 2) N, D] in a list, or [] without local views."""
        if len(views) == NUM_GLOBAL:
            return []
        tokens, _ = self.backbone.tokens(torch.cat(views[NUM_GLOBAL:]))
        return [tokens[:, 0]]

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        center = torch.stack(self.new_patch_centers).mean(0).to(self.patch_center.dtype)
        self.patch_center.lerp_(center, 1 - self.patch_center_momentum)
        self.new_patch_centers.clear()

    def check_views(self, views: list[Tensor]) -> None:
        patch = self.backbone.patch_size
        sizes = [tuple(view.shape[2:]) for view in views]
        expected = (self.grid[0] * patch, self.grid[1] * patch) if patch else None
        if sizes[0] != expected or sizes[1] != expected:
            raise ValueError(f"the first two views have {sizes[0]} and {sizes[1]} pixels, but iBOT masks {expected}")
        if len(set(sizes[NUM_GLOBAL:])) > 1:
            raise ValueError(f"the local views have the sizes {sizes[NUM_GLOBAL:]}, but iBOT needs one size for all")

    def effective(self, batch_size: int) -> dict[str, Any]:
        return super().effective(batch_size) | {"patches of a global view": f"{self.grid[0]} x {self.grid[1]}"}


def check_masks(ratios: tuple[float, ...], variations: tuple[float, ...]) -> None:
    """Raise ValueError unless each mask ratio and its variation give ratios from 0 to less than 1."""
    if not ratios or len(ratios) != len(variations):
        raise ValueError(
            f"mask_ratios is {list(ratios)} and mask_variations is {list(variations)}, but each ratio needs a variation"
        )
    for ratio, variation in zip(ratios, variations, strict=True):
        if variation < 0 or not 0 <= ratio - variation <= ratio + variation < 1:
            raise ValueError(
                f"the mask ratio {ratio} with the variation {variation} is not always at least 0 and less than 1"
            )
