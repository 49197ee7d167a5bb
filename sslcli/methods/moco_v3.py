"""MoCo v3: contrast with a predictor, a momentum encoder and in-batch negatives; no queue.

Chen, Xie, He 2021  https://arxiv.org/abs/2104.02057   conf/method/moco_v3.yaml

Shapes: N images per process, W processes, D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather, rank
from sslcli.methods.base import Batch, Method, num_features
from sslcli.methods.mixture import UnMix, add_mixture
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import Contrast, check_momentum, check_temperature, info_nce
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision
from sslcli.nn.schedule import ema_momentum


def contrast(query: Tensor, key: Tensor, *, temperature: float) -> Contrast:
    """Return the contrastive loss of Algorithm 1 (`ctr`): cross-entropy, multiplied by 2 * `temperature`.

    `query` and `key` are (N, D) and are normalized in this function. Query i must identify key i among the keys of
    all processes. The negatives of query i are the keys of all other images. All keys are from the same view.
    """
    query = F.normalize(full_precision(query), dim=1)
    key = F.normalize(key.to(query.dtype), dim=1).detach()
    own = rank() * len(key) + torch.arange(len(key), device=key.device)
    result = info_nce(query, key, all_gather(key), temperature=temperature, exclude=own[:, None])
    return Contrast(2 * temperature * result.loss, result.accuracy)


class MoCoV3(Method):
    """Symmetric contrast between the predictor's output and the momentum encoder's projection.

    Args:
        dim: embedding size D.
        hidden: width of the hidden layers of projector and predictor.
        projector_layers: number of projector layers; 2 for convolutional networks, 3 for ViT.
        predictor_norm: add BatchNorm without affine parameters after the predictor. The official runs with ViT use it;
            the official runs with ResNet do not.
        momentum: initial momentum of the momentum encoder.
        final_momentum: momentum at the end of the run, 1 in the official code. The momentum increases to it with a
            cosine schedule. The same value as `momentum` gives a constant momentum.
        temperature: tau, 1.0 for ResNet-50 and 0.2 for ViT and CIFAR.
        mixture: an `UnMix` that mixes the first views of different images; None adds no mixtures. The mixtures are
            additional queries. They are compared with the keys of both views.
    """

    num_views = 2
    uses_in_batch_negatives = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 256,
        hidden: int = 4096,
        projector_layers: int = 2,
        predictor_norm: bool = False,
        momentum: float = 0.99,
        final_momentum: float = 1.0,
        temperature: float = 1.0,
        mixture: UnMix | None = None,
    ) -> None:
        super().__init__(backbone)
        check_temperature(temperature)
        check_momentum(momentum, final_momentum)
        if projector_layers < 2:
            raise ValueError(f"projector_layers is {projector_layers}, but the projector has at least 2 layers")
        inner = [hidden] * (projector_layers - 1)
        self.projector = mlp([num_features(backbone), *inner, dim], last_norm="plain")
        self.predictor = mlp([dim, hidden, dim], last_norm="plain" if predictor_norm else None)
        convert_batch_norm(self, SyncBatchNorm)
        self.momentum_backbone = frozen_copy(self.backbone)
        self.momentum_projector = frozen_copy(self.projector)
        self.momentum = momentum
        self.final_momentum = final_momentum
        self.temperature = temperature
        self.mixture = mixture

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        rows, tau = self.embed(batch), self.temperature
        return add_mixture(
            self.mixture,
            self.compare(rows),
            batch.views[0],
            query=self.predict,
            compare=lambda q: contrast(q, rows[2], temperature=tau).loss + contrast(q, rows[3], temperature=tau).loss,
        )

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        x1, x2 = batch.views
        return self.predict(x1), self.predict(x2), self.target(x1), self.target(x2)  # (N, D)

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        q1, q2, k1, k2 = rows
        tau = self.temperature
        first, second = contrast(q1, k2, temperature=tau), contrast(q2, k1, temperature=tau)
        self.embeddings = (q1.detach(), q2.detach())
        return {"loss": first.loss + second.loss, "accuracy": (first.accuracy + second.accuracy) / 2}

    def predict(self, images: Tensor) -> Tensor:
        return self.predictor(self.projection(images))  # type: ignore[no-any-return]

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        return self.momentum_projector(self.momentum_backbone(images))  # type: ignore[no-any-return]

    def scheduled(self, progress: float) -> dict[str, float]:
        return {"EMA momentum": ema_momentum(progress, base=self.momentum, final=self.final_momentum)}

    def after_step(self, progress: float) -> None:
        momentum = self.scheduled(progress)["EMA momentum"]
        ema_update(self.momentum_backbone, self.backbone, momentum)
        ema_update(self.momentum_projector, self.projector, momentum)

    def projection(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]

    def num_negatives(self, batch_size: int) -> int:
        return batch_size - 1
