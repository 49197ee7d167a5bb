"""BYOL: prediction of the embedding that the target network computes for the other view, without negatives.

Grill et al. 2020  https://arxiv.org/abs/2006.07733   conf/method/byol.yaml

Shapes: N images per process, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslcli.methods.base import Batch, Method, num_features
from sslcli.methods.mixture import UnMix, add_mixture
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import check_momentum, cosine_distance
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.heads import mlp
from sslcli.nn.schedule import ema_momentum


def byol_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Return |p1 - z2|^2 + |p2 - z1|^2, averaged over images, in [0, 8] (eq. 2, symmetrized).

    All inputs are (N, D), and their rows are normalized first. `p1` and `p2` are the predictions for views 1 and 2.
    `z1` and `z2` are the projections of the target network. They receive no gradient.
    """
    return cosine_distance(p1, z2) + cosine_distance(p2, z1)


class BYOL(Method):
    """Bootstrap your own latent.

    Args:
        dim: embedding size D.
        hidden: width of the hidden layer of the projector and of the predictor.
        momentum: initial momentum of the target network. Official values are 0.996 for 1000 epochs and 0.99 for 100 to
            300 epochs.
        final_momentum: momentum at the end of the run, 1 in the official code. The momentum increases to it with a
            cosine schedule. The same value as `momentum` gives a constant momentum.
        predictor: False removes the predictor, as in an ablation of the paper. The embeddings may then collapse.
        mixture: an `UnMix` that mixes the first views of different images; None adds no mixtures. The predictions for
            the mixtures are compared with the targets of both views.
    """

    num_views = 2

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 256,
        hidden: int = 4096,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        predictor: bool = True,
        mixture: UnMix | None = None,
    ) -> None:
        super().__init__(backbone)
        check_momentum(momentum, final_momentum)
        self.projector = mlp([num_features(backbone), hidden, dim], bias=True)
        self.predictor = mlp([dim, hidden, dim], bias=True) if predictor else nn.Identity()
        convert_batch_norm(self, SyncBatchNorm)
        self.target_backbone = frozen_copy(self.backbone)
        self.target_projector = frozen_copy(self.projector)
        self.momentum = momentum
        self.final_momentum = final_momentum
        self.mixture = mixture

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x1, x2 = batch.views
        y1, y2 = self.projection(x1), self.projection(x2)  # (N, D)
        p1, p2 = self.predictor(y1), self.predictor(y2)
        z1, z2 = self.target(x1), self.target(x2)  # no gradient
        self.embeddings = (y1.detach(), y2.detach())
        return add_mixture(
            self.mixture,
            {"loss": byol_loss(p1, p2, z1, z2)},
            x1,
            query=lambda images: self.predictor(self.projection(images)),
            compare=lambda p: byol_loss(p, p, z1, z2),
        )

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        return self.target_projector(self.target_backbone(images))  # type: ignore[no-any-return]

    def scheduled(self, progress: float) -> dict[str, float]:
        return {"EMA momentum": ema_momentum(progress, base=self.momentum, final=self.final_momentum)}

    def after_step(self, progress: float) -> None:
        momentum = self.scheduled(progress)["EMA momentum"]
        ema_update(self.target_backbone, self.backbone, momentum)
        ema_update(self.target_projector, self.projector, momentum)

    def projection(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]

    def num_negatives(self, batch_size: int) -> int:
        return 0
