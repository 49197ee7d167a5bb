"""SwAV: prediction of the cluster assignments (codes) of other views of an image, with views of several sizes.

Caron et al. 2020  https://arxiv.org/abs/2006.09882   conf/method/swav.yaml

Shapes: N images per process, W processes, V views, D embedding size, K prototypes, Q queue length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather, local, rank, world_size
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, GroupOptions, Method, num_features
from sslcli.nn.assignments import summarize
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import check_temperature
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision
from sslcli.nn.multi_crop import forward_by_size
from sslcli.nn.sinkhorn import sinkhorn

NUM_CODES = 2  # codes are computed for the first two views, which have the full size


def swapped_prediction(scores: Tensor, codes: Tensor, *, temperature: float) -> Tensor:
    """Return the cross-entropy of the codes of each view i and the predictions of the other views (eq. 2, appendix B).

    The loss is the mean over images, over the first views i that have codes, and over the V - 1 views other than i.
    `scores` (V, N, K) are the similarities to the prototypes, and `codes` (2, N, K) are probabilities.
    """
    log_probabilities = F.log_softmax(scores / temperature, dim=2)
    losses = []
    for view, code in enumerate(codes):
        others = torch.cat([log_probabilities[:view], log_probabilities[view + 1 :]])
        losses.append(-(code * others).sum(2).mean())
    return torch.stack(losses).mean()


class SwAV(Method):
    """Swapped assignments between views.

    Args:
        dim: embedding size D.
        hidden: width of the hidden layer of the projector.
        num_prototypes: number of prototypes K.
        num_views: number of views V. The first two must have the same size.
        temperature: divisor of the scores in the predictions.
        sinkhorn_temperature: divisor of the scores in the codes (epsilon in the paper).
        sinkhorn_iterations: iterations of the Sinkhorn-Knopp algorithm.
        queue_size: number Q of earlier embeddings of each of the first two views, over all processes, that are assigned
            to prototypes together with a batch; 0 = none. Small batches need a queue.
        queue_epochs: number of epochs before the queue is filled. It is used as soon as it is full.
        freeze_prototypes_epochs: number of epochs at the start in which the prototypes are not trained.
    """

    num_views = 2
    queue: Tensor  # (2, Q, D), newest rows first

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 128,
        hidden: int = 2048,
        num_prototypes: int = 3000,
        num_views: int = 8,
        temperature: float = 0.1,
        sinkhorn_temperature: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_size: int = 0,
        queue_epochs: float = 15,
        freeze_prototypes_epochs: float = 1,
    ) -> None:
        super().__init__(backbone)
        check_temperature(temperature)
        check_temperature(sinkhorn_temperature)
        check_positive(num_prototypes=num_prototypes, sinkhorn_iterations=sinkhorn_iterations)
        if num_views < NUM_CODES:
            raise ValueError(f"num_views is {num_views}, but codes are predicted from other views: choose at least 2")
        if min(queue_size, queue_epochs, freeze_prototypes_epochs) < 0:
            raise ValueError(
                f"queue_size is {queue_size}, queue_epochs {queue_epochs} and freeze_prototypes_epochs "
                f"{freeze_prototypes_epochs}, but none of them can be negative"
            )
        self.projector = mlp([num_features(backbone), hidden, dim], bias=True, last_bias=True)
        self.prototypes = nn.Linear(dim, num_prototypes, bias=False)
        convert_batch_norm(self, SyncBatchNorm)
        self.num_views = num_views
        self.temperature = temperature
        self.sinkhorn_temperature = sinkhorn_temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.queue_size = queue_size
        self.queue_epochs = queue_epochs
        self.freeze_prototypes_epochs = freeze_prototypes_epochs
        self.register_buffer("queue", torch.zeros(NUM_CODES, queue_size, dim))
        self.queued = 0  # number of rows that were put into the queue of a view, at most Q
        self.fills_queue = self.uses_queue = False
        self.new_rows: list[Tensor] = []  # (2, WN, D) for each micro-batch of this step; after_step enqueues them
        self.before_step(0.0, 0.0)

    @torch.no_grad()
    def before_step(self, progress: float, epoch: float) -> None:
        weight = local(self.prototypes.weight)  # a shard has whole rows
        weight.copy_(F.normalize(weight, dim=1))
        self.fills_queue = self.queue_size > 0 and epoch >= self.queue_epochs
        self.uses_queue = self.fills_queue and self.queued == self.queue_size

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        projections = self.projector(forward_by_size(self.backbone, batch.views))
        z = F.normalize(full_precision(projections), dim=1).view(len(batch.views), -1, projections.shape[1])
        scores = self.scores(z)  # (V, N, K)
        self.embeddings = tuple(z[:NUM_CODES].detach())
        self.assignments = summarize(F.softmax(scores[:NUM_CODES].detach() / self.temperature, dim=2))
        codes = torch.stack([self.codes(scores[view].detach(), self.queue[view]) for view in range(NUM_CODES)])
        if self.fills_queue:
            self.new_rows.append(torch.stack([all_gather(rows) for rows in self.embeddings]))
        return {"loss": swapped_prediction(scores, codes, temperature=self.temperature)}

    def scores(self, z: Tensor) -> Tensor:
        """Return the similarities to the prototypes in full precision: (..., D) -> (..., K)."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, self.prototypes.weight.to(z.dtype))

    @torch.no_grad()
    def codes(self, scores: Tensor, queue: Tensor) -> Tensor:
        """Return the codes (N, K) of the images with these `scores` (N, K).

        `queue` (Q, D) contains earlier embeddings of the same view. Each process assigns an equal part of them.
        """
        num_images = len(scores)
        if self.uses_queue:
            mine = queue.tensor_split(world_size())[rank()]
            scores = torch.cat([self.scores(mine.to(scores.dtype)), scores])
        assigned = sinkhorn(scores, temperature=self.sinkhorn_temperature, iterations=self.sinkhorn_iterations)
        return assigned[-num_images:]

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        for rows in self.new_rows:
            self.queue.copy_(torch.cat([rows.to(self.queue.dtype), self.queue], dim=1)[:, : self.queue_size])
            self.queued = min(self.queued + rows.shape[1], self.queue_size)
        self.new_rows.clear()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.queued)

    def set_extra_state(self, state: Tensor) -> None:
        self.queued = int(state)

    def projection(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]

    def group_options(self) -> dict[str, GroupOptions]:
        return {"prototypes": {"frozen_epochs": self.freeze_prototypes_epochs}}

    def num_negatives(self, batch_size: int) -> int:
        return 0
