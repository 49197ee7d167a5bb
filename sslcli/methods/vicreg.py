"""VICReg: similar embeddings of two views, with variance and covariance terms against collapse.

Bardes, Ponce, LeCun 2022  https://arxiv.org/abs/2105.04906   conf/method/vicreg.yaml

Shapes: N images per process, W processes, G = W N images, D embedding size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather_with_grad
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.correlation import off_diagonal_sum_of_squares
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision

EPSILON = 1e-4  # added to the variance; main_vicreg.py


class Terms(NamedTuple):
    """The three terms of the loss, without their weights. Each is a scalar."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg_terms(z1: Tensor, z2: Tensor) -> Terms:
    """Return the terms of the loss (eq. 1 to 5) for the embeddings (N, D) of two views. Row i is the same image.

    invariance: mean squared difference, over the rows of this process.
    variance: mean of max(0, 1 - std) over the dimensions and both views.
    covariance: sum of the squared covariances of different dimensions, divided by D, summed over both views.

    Standard deviations and covariances are those of the G rows of all processes, with divisor G - 1. Gradients flow to
    the rows of all processes. The terms are computed in float32 (float64 for float64 inputs).
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = full_precision(z1), full_precision(z2)
        invariance = (z1 - z2).square().mean()
        z1, z2 = (all_gather_with_grad(z) for z in (z1, z2))  # (G, D)
        z1, z2 = z1 - z1.mean(0), z2 - z2.mean(0)
        count, dim = z1.shape
        std1, std2 = ((z.square().sum(0) / (count - 1) + EPSILON).sqrt() for z in (z1, z2))
        variance = (torch.relu(1 - std1).mean() + torch.relu(1 - std2).mean()) / 2
        squares = off_diagonal_sum_of_squares(z1, z1) + off_diagonal_sum_of_squares(z2, z2)
        return Terms(invariance, variance, squares / ((count - 1) ** 2 * dim))


class VICReg(Method):
    """Variance-invariance-covariance regularization.

    Args:
        dim: embedding size D.
        hidden: width of the two hidden layers of the expander.
        invariance: weight of the invariance term.
        variance: weight of the variance term. Without this term, all embeddings become equal.
        covariance: weight of the covariance term.
    """

    num_views = 2
    uses_in_batch_negatives = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 8192,
        hidden: int = 8192,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
    ) -> None:
        super().__init__(backbone)
        for name, weight in {"invariance": invariance, "variance": variance, "covariance": covariance}.items():
            if not weight >= 0:
                raise ValueError(f"{name} is {weight}, but the weight of a term must be at least 0")
        self.expander = mlp([num_features(backbone), hidden, hidden, dim], bias=True)
        convert_batch_norm(self, SyncBatchNorm)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.compare(self.embed(batch))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        x1, x2 = batch.views
        return self.projection(x1), self.projection(x2)  # (N, D)

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        z1, z2 = rows
        terms = vicreg_terms(z1, z2)
        loss = self.invariance * terms.invariance + self.variance * terms.variance + self.covariance * terms.covariance
        self.embeddings = (z1.detach(), z2.detach())
        return {"loss": loss, **terms._asdict()}

    def projection(self, images: Tensor) -> Tensor:
        return self.expander(self.backbone(images))  # type: ignore[no-any-return]

    def num_negatives(self, batch_size: int) -> int:
        return 0
