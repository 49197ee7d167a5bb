"""Alignment and uniformity: views of an image lie close together, and images spread over the sphere.

Wang, Isola 2020  https://arxiv.org/abs/2005.10242   conf/method/hypersphere.yaml

Shapes: N images per process, D embedding dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.methods.base import Batch, Method, num_features


def alignment(z1: Tensor, z2: Tensor, *, alpha: float) -> Tensor:
    """Mean of |z1 - z2|^alpha over images; `z1` and `z2` are (N, D) of unit length."""
    return (z1 - z2).square().sum(1).pow(alpha / 2).mean()


def uniformity(z: Tensor, *, t: float) -> Tensor:
    """Log of the mean of exp(-t |z_i - z_j|^2) over pairs of images; `z` is (N, D) of unit length."""
    return torch.pdist(z).square().mul(-t).exp().mean().log()


class Hypersphere(Method):
    """Alignment plus weighted uniformity.

    Args:
        dim: embedding dimension D.
        alpha: exponent of the distance between two views.
        t: scale of the squared distances; with a larger t, near neighbors have more influence.
        weight: weight of uniformity in the loss.
    """

    num_views = 2

    def __init__(
        self, backbone: nn.Module, *, dim: int = 64, alpha: float = 2.0, t: float = 2.0, weight: float = 1.0
    ) -> None:
        super().__init__(backbone)
        if t <= 0:
            raise ValueError(f"t is {t}, but images repel each other only with a positive one; the paper has 2")
        self.head = nn.Linear(num_features(backbone), dim)
        self.alpha, self.t, self.weight = alpha, t, weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z1, z2 = (F.normalize(self.projection(view).float(), dim=1) for view in batch.views)  # (N, D)
        self.embeddings = (z1.detach(), z2.detach())
        near = alignment(z1, z2, alpha=self.alpha)
        spread = (uniformity(z1, t=self.t) + uniformity(z2, t=self.t)) / 2
        return {"loss": near + self.weight * spread, "alignment": near, "uniformity": spread}

    def projection(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))
