"""ReSSL: the similarities of a strongly augmented view to a queue become those of a weakly augmented view.

Zheng et al. 2021  https://arxiv.org/abs/2107.09282   conf/method/ressl.yaml

The values are those of solo-learn, solo/methods/ressl.py.

Shapes: N images per process, W processes, D embedding size, K queue length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import check_momentum, check_temperature
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision
from sslcli.nn.queue import enqueue_all
from sslcli.nn.schedule import ema_momentum


def relation_loss(
    query: Tensor, key: Tensor, queue: Tensor, *, temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (cross-entropy, divergence) between the relations of the teacher and of the student to the queue (eq. 5).

    Args:
        query: (N, D), unit embeddings of the student for the strongly augmented view.
        key: (N, D), unit embeddings of the teacher for the weakly augmented view, without gradient.
        queue: (K, D), unit rows.
        temperature: divisor of the student's similarities.
        teacher_temperature: divisor of the teacher's similarities. It is smaller, so that the target is sharper.

    A relation is the softmax of the similarities to the rows of the queue. The divergence is the cross-entropy minus
    the entropy of the teacher's relation. It is 0 if both relations are equal, and it has no gradient. Both are means
    over images, computed in float32 (float64 for float64 inputs).
    """
    with torch.autocast(query.device.type, enabled=False):
        query = full_precision(query)
        target = F.softmax(key.to(query.dtype) @ queue.T.to(query.dtype) / teacher_temperature, dim=1)
        loss = F.cross_entropy(query @ queue.T.to(query.dtype) / temperature, target)
        entropy = torch.special.entr(target).sum(1).mean()
        return loss, loss.detach() - entropy


class ReSSL(Method):
    """Relational self-supervised learning. View 1 is the strongly augmented view, view 2 the weakly augmented one.

    Args:
        dim: embedding size D.
        hidden: width of the hidden layer of the projector.
        queue_size: number K of embeddings of the teacher in the queue.
        momentum: initial momentum of the teacher.
        final_momentum: momentum at the end of the run. The momentum increases to it with a cosine schedule.
        temperature: divisor of the student's similarities.
        teacher_temperature: divisor of the teacher's similarities, less than `temperature`.
    """

    num_views = 2
    decreasing_metric = "divergence"  # the loss contains the entropy of the target, which need not decrease
    queue: Tensor  # (K, D), unit rows; oldest rows are overwritten first
    queue_head: Tensor  # scalar tensor: index of the next row to overwrite

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 256,
        hidden: int = 4096,
        queue_size: int = 65536,
        momentum: float = 0.99,
        final_momentum: float = 1.0,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
    ) -> None:
        super().__init__(backbone)
        check_momentum(momentum, final_momentum)
        check_temperature(teacher_temperature)
        check_positive(queue_size=queue_size)
        if teacher_temperature >= temperature:
            raise ValueError(
                f"teacher_temperature is {teacher_temperature}, but it must be below temperature={temperature}: "
                "otherwise the target is not sharper than the prediction, and the embeddings collapse"
            )
        self.projector = mlp([num_features(backbone), hidden, dim], norm=False, bias=True, last_bias=True)
        convert_batch_norm(self, SyncBatchNorm)
        self.teacher_backbone = frozen_copy(self.backbone)
        self.teacher_projector = frozen_copy(self.projector)
        self.momentum, self.final_momentum = momentum, final_momentum
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("queue_head", torch.zeros((), dtype=torch.long))
        self.new_keys: list[Tensor] = []  # keys of this step's micro-batches; after_step enqueues them

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        strong, weak = batch.views
        query = F.normalize(full_precision(self.projection(strong)), dim=1)  # (N, D)
        key = self.target(weak)
        loss, divergence = relation_loss(
            query, key, self.queue, temperature=self.temperature, teacher_temperature=self.teacher_temperature
        )
        self.embeddings = (query.detach(), key)
        self.new_keys.append(all_gather(key))  # (W N, D)
        return {"loss": loss, "divergence": divergence}

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """Return the unit embeddings of the teacher: (N, C, H, W) -> (N, D)."""
        return F.normalize(full_precision(self.teacher_projector(self.teacher_backbone(images))), dim=1)

    def scheduled(self, progress: float) -> dict[str, float]:
        return {"EMA momentum": ema_momentum(progress, base=self.momentum, final=self.final_momentum)}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = self.scheduled(progress)["EMA momentum"]
        ema_update(self.teacher_backbone, self.backbone, momentum)
        ema_update(self.teacher_projector, self.projector, momentum)
        enqueue_all(self.queue, self.queue_head, self.new_keys)

    def projection(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]

    @property
    def queue_length(self) -> int:
        return len(self.queue)

    def num_negatives(self, batch_size: int) -> int:
        return 0
