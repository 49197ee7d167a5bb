"""Barlow Twins: the cross-correlation matrix of the embeddings of two views becomes the identity.

Zbontar et al. 2021  https://arxiv.org/abs/2103.03230   conf/method/barlow_twins.yaml

Shapes: N images per process, W processes, G = W N images, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather_with_grad
from sslcli.methods.base import Batch, GroupOptions, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.correlation import off_diagonal_sum_of_squares
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision

EPSILON = 1e-5  # added to the variance, as in torch's BatchNorm


def standardized(z: Tensor) -> Tensor:
    """Give each column of `z` (G, D) mean 0 and variance 1, as BatchNorm without affine parameters does."""
    variance, mean = torch.var_mean(z, dim=0, correction=0)
    return (z - mean) * torch.rsqrt(variance + EPSILON)


def correlation_terms(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Return (on-diagonal term, off-diagonal term) of the cross-correlation matrix C (D, D) of two views (eq. 1, 2).

    The terms are scalars: the sum of (C_ii - 1)^2, and the sum of C_ij^2 over i != j. `z1` and `z2` are (N, D), and row
    i of both belongs to the same image. C is computed from the G rows of all processes, and gradients flow to all of
    them. The terms are computed in float32 (float64 for float64 inputs).
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (standardized(all_gather_with_grad(full_precision(z))) for z in (z1, z2))  # (G, D)
        count = len(z1)
        on_diagonal = ((z1 * z2).sum(0) / count - 1).square().sum()
        return on_diagonal, off_diagonal_sum_of_squares(z1, z2) / count**2


class BarlowTwins(Method):
    """Redundancy reduction between the dimensions of the embeddings.

    Args:
        dim: embedding size D.
        hidden: width of the hidden layers of the projector.
        layers: number of linear layers of the projector, at least 1.
        redundancy: lambda, the weight of the off-diagonal term.
        loss_scale: factor of the loss, 1 in the official code and 0.1 in solo-learn. LARS adapts the step of a weight
            matrix to its gradient. Therefore the factor changes only the steps of biases and BatchNorm parameters, and
            the influence of weight decay.
        plain_lr_scale: learning rate of biases and BatchNorm parameters, relative to the learning rate of the weight
            matrices. LARS does not adapt the steps of biases and BatchNorm parameters.
    """

    num_views = 2
    uses_in_batch_negatives = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 8192,
        hidden: int = 8192,
        layers: int = 3,
        redundancy: float = 0.0051,
        loss_scale: float = 1.0,
        plain_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(backbone)
        factors = {"redundancy": redundancy, "loss_scale": loss_scale, "plain_lr_scale": plain_lr_scale}
        for name, factor in factors.items():
            if not factor > 0:
                raise ValueError(f"{name} is {factor}, but this factor must be positive")
        if layers < 1:
            raise ValueError(f"layers is {layers}, but the projector has at least one")
        self.projector = mlp([num_features(backbone), *([hidden] * (layers - 1)), dim])
        convert_batch_norm(self, SyncBatchNorm)
        self.redundancy, self.loss_scale, self.plain_lr_scale = redundancy, loss_scale, plain_lr_scale

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.compare(self.embed(batch))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        x1, x2 = batch.views
        return self.projection(x1), self.projection(x2)  # (N, D)

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        z1, z2 = rows
        on_diagonal, off_diagonal = correlation_terms(z1, z2)
        loss = self.loss_scale * (on_diagonal + self.redundancy * off_diagonal)
        self.embeddings = (z1.detach(), z2.detach())
        return {"loss": loss, "on_diagonal": on_diagonal, "off_diagonal": off_diagonal}

    def projection(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]

    def group_options(self) -> dict[str, GroupOptions]:
        plain = [name for name, parameter in self.named_parameters() if parameter.ndim <= 1]
        return {name: {"lr_scale": self.plain_lr_scale} for name in plain} if self.plain_lr_scale != 1 else {}

    def num_negatives(self, batch_size: int) -> int:
        return 0
