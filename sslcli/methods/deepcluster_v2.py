"""DeepCluster v2: prediction of the cluster that k-means found for an image in the last epoch, with multi-crop.

Caron et al. 2020  https://arxiv.org/abs/2006.09882, section 4 and appendix D   conf/method/deepcluster_v2.yaml

Shapes: N images per process, n training images, V views, D embedding size, H heads, K clusters of a head.

Departure from the official code (https://github.com/facebookresearch/swav/blob/main/main_deepclusterv2.py): the code
fills its memory bank in an extra pass over the images before training. Here, this pass is the first epoch of the run:
no image has a cluster yet, the loss is 0, and the parameters are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather, all_reduce_mean, world_size
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, GroupOptions, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import check_temperature
from sslcli.nn.heads import mlp
from sslcli.nn.kmeans import spherical_kmeans
from sslcli.nn.modes import full_precision
from sslcli.nn.multi_crop import forward_by_size
from sslcli.nn.noise import Noise

NUM_BANKS = 2  # embeddings of the first two views, which have the full size, are clustered
UNSEEN = -100  # cluster of an image without an embedding of the last epoch


def cluster_prediction(scores: Sequence[Tensor], clusters: Tensor, *, temperature: float) -> Tensor:
    """Return the cross-entropy of the clusters, averaged over views, images that have a cluster, and heads.

    `scores` are the similarities (V, N, K) of each head to its prototypes. `clusters` (H, N) are integers below K, or
    UNSEEN. The images are counted over all processes. If none of them has a cluster, the loss is 0.
    """
    num_images = all_reduce_mean((clusters[0] != UNSEEN).sum().to(scores[0].dtype))
    losses = [
        F.cross_entropy(
            logits.flatten(0, 1) / temperature, own.repeat(len(logits)), ignore_index=UNSEEN, reduction="sum"
        )
        for logits, own in zip(scores, clusters, strict=True)
    ]
    return torch.stack(losses).mean() / (len(scores[0]) * num_images.clamp(min=1 / world_size()))


class DeepClusterV2(Method):
    """Prediction of clusters of the last epoch's embeddings.

    At the start of each epoch, k-means divides the embeddings of the last epoch into clusters, once per head. The
    centroids are the prototypes of this epoch. They are not trained.

    Args:
        num_images: number of training images n; `ssl-train` sets this argument.
        dim: embedding size D.
        hidden: width of the hidden layer of the projector.
        num_prototypes: number of clusters K of each head. Head h clusters the embeddings of view h mod 2.
        num_views: number of views V. The first two must have the same size.
        temperature: divisor of the scores.
        kmeans_iterations: iterations of k-means at the start of an epoch.

    Raises ValueError if an argument is out of range, or if there are fewer images than clusters.
    """

    num_views = 2
    bank: Tensor  # (2, n, D): newest embedding of the first two views of each image
    seen: Tensor  # (n,) bool: True if the image has an embedding of this epoch
    clusters: Tensor  # (H, n): cluster of each image in this epoch, or UNSEEN

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_images: int,
        dim: int = 128,
        hidden: int = 2048,
        num_prototypes: Sequence[int] = (3000, 3000, 3000),
        num_views: int = 8,
        temperature: float = 0.1,
        kmeans_iterations: int = 10,
    ) -> None:
        super().__init__(backbone)
        check_temperature(temperature)
        check_positive(num_images=num_images, dim=dim, kmeans_iterations=kmeans_iterations)
        if not num_prototypes or min(num_prototypes) < 1 or max(num_prototypes) > num_images:
            raise ValueError(
                f"num_prototypes is {list(num_prototypes)}, but each head needs 1 to {num_images} clusters, since "
                f"there are {num_images} training images: choose about a tenth of them, such as "
                f"method.num_prototypes=[{max(1, num_images // 10)}]"
            )
        if num_views < NUM_BANKS:
            raise ValueError(
                f"num_views is {num_views}, but the embeddings of two views are clustered: choose 2 or more"
            )
        self.projector = mlp([num_features(backbone), hidden, dim], bias=True, last_bias=True)
        convert_batch_norm(self, SyncBatchNorm)
        self.num_views = num_views
        self.temperature = temperature
        self.kmeans_iterations = kmeans_iterations
        self.noise = Noise()
        self.register_buffer("bank", torch.zeros(NUM_BANKS, num_images, dim))
        self.register_buffer("seen", torch.zeros(num_images, dtype=torch.bool))
        self.register_buffer("clusters", torch.full((len(num_prototypes), num_images), UNSEEN))
        for head, count in enumerate(num_prototypes):
            self.register_buffer(f"prototypes{head}", torch.zeros(count, dim))
        self.epoch = 0  # the epoch of `clusters`
        self.new: list[tuple[Tensor, Tensor]] = []  # index and embeddings of this step; after_step stores them

    @property
    def prototypes(self) -> list[Tensor]:
        """The prototypes (K, D) of each head, of length 1; zeros in the first epoch."""
        return [self.get_buffer(f"prototypes{head}") for head in range(len(self.clusters))]

    def before_step(self, progress: float, epoch: float) -> None:
        if int(epoch) > self.epoch:
            self.epoch = int(epoch)
            self.cluster()

    @torch.no_grad()
    def cluster(self) -> None:
        """Set prototypes and clusters by k-means on the embeddings since the last call; other images get UNSEEN."""
        for head, prototypes in enumerate(self.prototypes):
            order = torch.rand(len(self.seen), generator=self.noise.shared()).to(self.seen.device)
            first = order.masked_fill(~self.seen, -1).topk(len(prototypes)).indices
            rows = self.bank[head % NUM_BANKS]
            centroids, clusters = spherical_kmeans(rows, self.seen, rows[first], iterations=self.kmeans_iterations)
            prototypes.copy_(centroids)
            self.clusters[head] = clusters.masked_fill(~self.seen, UNSEEN)
        self.seen.fill_(False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        projections = self.projector(forward_by_size(self.backbone, batch.views))
        with torch.autocast(projections.device.type, enabled=False):
            z = F.normalize(full_precision(projections), dim=1).view(len(batch.views), -1, projections.shape[1])
            scores = [z @ prototypes.T for prototypes in self.prototypes]
            loss = cluster_prediction(scores, self.clusters[:, batch.index], temperature=self.temperature)
        self.embeddings = tuple(z[:NUM_BANKS].detach())
        self.new.append((all_gather(batch.index), torch.stack([all_gather(rows) for rows in self.embeddings])))
        return {"loss": loss}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        for index, embeddings in self.new:
            self.bank.index_copy_(1, index, embeddings.to(self.bank.dtype))
            self.seen.index_fill_(0, index, True)
        self.new.clear()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.epoch)

    def set_extra_state(self, state: Tensor) -> None:
        self.epoch = int(state)

    def projection(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]

    def group_options(self) -> dict[str, GroupOptions]:
        return {"backbone": {"frozen_epochs": 1}, "projector": {"frozen_epochs": 1}}

    def num_negatives(self, batch_size: int) -> int:
        return 0

    def effective(self, batch_size: int) -> dict[str, Any]:
        banks, rows, dim = self.bank.shape
        return super().effective(batch_size) | {
            "memory bank": f"{banks} x {rows:,} x {dim}, {4 * banks * rows * dim / 1e6:,.1f} MB",
        }
