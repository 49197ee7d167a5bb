"""Distillation without labels: a small network learns the features of a teacher that is already trained.

The losses are those of lightly-train's method `distillation` (version 1), which takes the mixed images and the patience
of Beyer et al. 2021  https://arxiv.org/abs/2106.05237   conf/method/distill.yaml

Facts: src/lightly_train/_methods/distillation/ of lightly-ai/lightly-train.

Shapes: N images per process, W processes, D features of the teacher, K queue length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features
from sslcli.methods.ressl import relation_loss
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import check_temperature, cosine_distance
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise
from sslcli.nn.queue import enqueue_all

LARGEST_QUEUE = 8192  # of lightly-train, for at least 20,000 images
QUEUE_FRACTION = 4  # of the images; lightly-train has a third to a fifth
LOSSES = ("relations", "cosine")


class Teacher(nn.Module):
    """A trained network in evaluation mode, without gradient, for images with another normalization.

    Args:
        net: network from images (N, C, H, W) to features (N, D).
        mean, std: normalization of the images that `forward` gets, per channel.
        own_mean, own_std: normalization with which `net` was trained.
    """

    scale: Tensor  # (C, 1, 1)
    shift: Tensor  # (C, 1, 1)

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        own_mean: Sequence[float],
        own_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.net = net
        self.num_features = num_features(net)
        before, after = (torch.tensor([a, b]).view(2, -1, 1, 1) for a, b in ((mean, std), (own_mean, own_std)))
        self.register_buffer("scale", before[1] / after[1])
        self.register_buffer("shift", (before[0] - after[0]) / after[1])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of images (N, C, H, W)."""
        return self.net(images * self.scale + self.shift)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)


def without_teacher(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Remove the teacher from a state dict. The arguments are those of torch's hook."""
    for name in [name for name in state if name.startswith(f"{prefix}teacher.")]:
        del state[name]


def ignore_teacher(module: nn.Module, incompatible: Any) -> None:
    """Accept a state dict without the teacher. The arguments are those of torch's hook."""
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith("teacher.")]


class Distill(Method):
    """Matches the features of the backbone, the student, with those of a teacher.

    The state dict does not contain the teacher: each start of a run loads it again, and probes do not need it.

    Args:
        num_images: number of training images; ssl-train sets it.
        teacher_network: the teacher; ssl-train sets it. None if the method is only evaluated.
        teacher_features: number of features D of the teacher; ssl-train sets it.
        loss: "relations" is the divergence between the similarities of teacher and student to a queue of features of
            the teacher. "cosine" is 2 - 2 cos of the angle between the features of teacher and student.
        queue_size: length K of the queue. None: the largest power of two that is at most a quarter of the images, and
            at most 8192. Unused with "cosine".
        temperature: divisor of the similarities. Unused with "cosine".
        mixup: mix each image with another one. Teacher and student get the same mixed images.
    """

    num_views = 1
    queue: Tensor  # (K, D), unit rows; oldest rows are overwritten first
    queue_head: Tensor  # scalar tensor: index of the next row to overwrite

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_images: int,
        teacher_network: Teacher | None,
        teacher_features: int,
        loss: Literal["relations", "cosine"] = "relations",
        queue_size: int | None = None,
        temperature: float = 0.07,
        mixup: bool = True,
    ) -> None:
        super().__init__(backbone)
        check_temperature(temperature)
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}, but it must be one of: {', '.join(LOSSES)}")
        if queue_size is None:
            queue_size = min(LARGEST_QUEUE, 1 << max(0, (num_images // QUEUE_FRACTION).bit_length() - 1))
        check_positive(queue_size=queue_size)
        convert_batch_norm(self, SyncBatchNorm)
        self.head = nn.Linear(num_features(backbone), teacher_features)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.loss, self.temperature, self.mixup = loss, temperature, mixup
        self.noise = Noise()
        rows = queue_size if loss == "relations" else 0
        self.register_buffer("queue", F.normalize(torch.randn(rows, teacher_features), dim=1))
        self.register_buffer("queue_head", torch.zeros((), dtype=torch.long))
        self.new_keys: list[Tensor] = []  # teacher's features of this step's micro-batches; after_step enqueues them
        self.teacher = teacher_network
        self.register_state_dict_post_hook(without_teacher)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(ignore_teacher)  # type: ignore[no-untyped-call]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        if self.mixup:
            images = self.mixed(images)
        query = F.normalize(full_precision(self.projection(images)), dim=1)  # (N, D)
        key = self.target(images)
        self.embeddings = (query.detach(),)
        similarity = (query.detach() * key).sum(1).mean()
        if self.loss == "cosine":
            return {"loss": cosine_distance(query, key), "similarity": similarity}
        keys = all_gather(key)  # (W N, D)
        self.new_keys.append(keys)
        entropy_loss, divergence = relation_loss(
            query,
            key,
            torch.cat([keys, self.queue]),
            temperature=self.temperature,
            teacher_temperature=self.temperature,
        )
        # The entropy of the teacher has no gradient, so this is the divergence with its gradient.
        return {"loss": entropy_loss - entropy_loss.detach() + divergence, "similarity": similarity}

    def mixed(self, images: Tensor) -> Tensor:
        """Return w x_i + (1 - w) x_j for image i of N and j = N-1-i, with an own w, uniform in [0, 1), per image."""
        weight = self.noise.uniform(len(images), 1, 1, 1, device=images.device).to(images.dtype)
        return images.flip(0).lerp(images, weight)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """Return the unit features of the teacher: (N, C, H, W) -> (N, D)."""
        if self.teacher is None:
            raise ValueError("this method was built for evaluation, without its teacher")
        return F.normalize(full_precision(self.teacher(images)), dim=1)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        enqueue_all(self.queue, self.queue_head, self.new_keys)

    def projection(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))  # type: ignore[no-any-return]

    @property
    def queue_length(self) -> int:
        return len(self.queue)

    def num_negatives(self, batch_size: int) -> int:
        return 0

    def effective(self, batch_size: int) -> dict[str, Any]:
        return {"teacher features": self.head.out_features, "queue": len(self.queue)}
