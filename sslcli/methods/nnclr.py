"""NNCLR: contrast with the nearest neighbor of an embedding in a queue of earlier embeddings.

Dwibedi et al. 2021  https://arxiv.org/abs/2104.14548   conf/method/nnclr.yaml

There is no official PyTorch code. The values are those of solo-learn, solo/methods/nnclr.py.

Shapes: N images per process, W processes, D embedding size, K queue length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather, all_gather_with_grad, rank
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import Contrast, check_temperature, info_nce
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision
from sslcli.nn.queue import enqueue_all

LARGEST_QUEUE = 65536  # default of solo-learn


@torch.no_grad()
def nearest(z: Tensor, queue: Tensor) -> Tensor:
    """Return the index of the row of `queue` (K, D) with the largest inner product, for each row of `z`: (N,) int64.

    The inner products are computed in float32, even under autocast. With 16 bits, many rows would be equally near.
    """
    with torch.autocast(z.device.type, enabled=False):
        return (z @ queue.T.to(z.dtype)).argmax(1)


def neighbor_contrast(neighbor: Tensor, prediction: Tensor, *, temperature: float) -> Contrast:
    """Return the contrastive loss of the neighbors with the predictions of the other view (eq. 3).

    `neighbor` and `prediction` are (N, D), and the rows are normalized in this function. Neighbor i must identify
    prediction i among the predictions of all processes. Gradients flow to the predictions of all processes.
    """
    prediction = F.normalize(full_precision(prediction), dim=1)
    neighbor = F.normalize(neighbor.to(prediction.dtype), dim=1)
    own = rank() * len(prediction) + torch.arange(len(prediction), device=prediction.device)
    candidates = all_gather_with_grad(prediction)  # (W N, D)
    return info_nce(neighbor, prediction, candidates, temperature=temperature, exclude=own[:, None])


class NNCLR(Method):
    """Nearest-neighbor contrastive learning of representations.

    Args:
        num_images: number of training images. `ssl-train` sets it.
        dim: embedding size D.
        hidden: width of the hidden layers of the projector.
        predictor_hidden: width of the hidden layer of the predictor.
        queue_size: number K of embeddings in the queue. None selects half of the training images, and at most 65536. In
            a longer queue, the nearest neighbor of an image is often an earlier embedding of the same image.
        temperature: divisor of the cosine similarities: 0.1 on ImageNet, 0.2 on CIFAR.
    """

    num_views = 2
    queue: Tensor  # (K, D), unit rows; oldest rows are overwritten first
    queue_head: Tensor  # scalar tensor: index of the next row to overwrite

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_images: int,
        dim: int = 256,
        hidden: int = 2048,
        predictor_hidden: int = 4096,
        queue_size: int | None = None,
        temperature: float = 0.1,
    ) -> None:
        super().__init__(backbone)
        check_temperature(temperature)
        size = max(1, min(LARGEST_QUEUE, num_images // 2)) if queue_size is None else queue_size
        check_positive(queue_size=size)
        self.projector = mlp(
            [num_features(backbone), hidden, hidden, dim], bias=True, last_norm="affine", last_bias=True
        )
        self.predictor = mlp([dim, predictor_hidden, dim], bias=True, last_bias=True)
        convert_batch_norm(self, SyncBatchNorm)
        self.temperature = temperature
        self.register_buffer("queue", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("queue_head", torch.zeros((), dtype=torch.long))
        self.new_keys: list[Tensor] = []  # embeddings of this step's micro-batches; after_step enqueues them

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z1, z2 = (self.projection(view) for view in batch.views)  # (N, D)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        z1, z2 = (F.normalize(full_precision(z.detach()), dim=1) for z in (z1, z2))
        n1, n2 = (self.queue[nearest(z, self.queue)] for z in (z1, z2))
        first = neighbor_contrast(n1, p2, temperature=self.temperature)
        second = neighbor_contrast(n2, p1, temperature=self.temperature)
        self.embeddings = (z1, z2)
        self.new_keys.append(all_gather(z1))  # (W N, D); only view 1 is enqueued
        return {
            "loss": (first.loss + second.loss) / 2,
            "accuracy": (first.accuracy + second.accuracy) / 2,
            "neighbor_similarity": (z1 * n1).sum(1).mean(),
        }

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        enqueue_all(self.queue, self.queue_head, self.new_keys)

    def projection(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]

    @property
    def queue_length(self) -> int:
        return len(self.queue)

    def num_negatives(self, batch_size: int) -> int:
        return batch_size - 1
