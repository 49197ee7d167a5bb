"""Projection head of DINO, iBOT and DINOv2: an MLP, then similarities to prototypes.

Caron et al. 2021  https://arxiv.org/abs/2104.14294, DINOHead in dino/vision_transformer.py

Shapes: N rows, D features, E bottleneck width, K prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """Linear layer without bias whose weight rows are g v / |v|, as with weight normalization: (N, E) -> (N, K).

    Args:
        dim: bottleneck width E.
        num_prototypes: number K of rows.
        trained_gain: train the lengths g of the rows. Otherwise, all rows have length 1.
    """

    def __init__(self, dim: int, num_prototypes: int, *, trained_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=trained_gain)
        # The lengths of the rows do not change the output. However, the same step changes the direction of a longer row
        # less. Unlike the other layers, this one has the default initialization of nn.Linear in the official code.
        self.weight_v = nn.Parameter(nn.Linear(dim, num_prototypes, bias=False).weight.detach())

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight_g * F.normalize(self.weight_v, dim=1, eps=0.0))


class PrototypeHead(nn.Module):
    """Linear layers with GELU in between, L2 normalization, and similarities to prototypes: (N, D) -> (N, K).

    Args:
        width: number of features D.
        hidden: width of the hidden layers.
        dim: bottleneck width E.
        num_prototypes: number of prototypes K.
        layers: number of linear layers before the prototypes.
        norm: add BatchNorm before each GELU.
        trained_gain: train the lengths of the prototypes.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int,
        dim: int,
        num_prototypes: int,
        layers: int = 3,
        norm: bool = False,
        trained_gain: bool = False,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for number in range(layers - 1):
            parts.append(nn.Linear(hidden if number else width, hidden))
            parts += [nn.BatchNorm1d(hidden), nn.GELU()] if norm else [nn.GELU()]
        parts.append(nn.Linear(hidden if layers > 1 else width, dim))
        for part in parts:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.mlp = nn.Sequential(*parts)
        self.last_layer = Prototypes(dim, num_prototypes, trained_gain=trained_gain)

    def bottleneck(self, features: Tensor) -> Tensor:
        """Return the unit vectors that are compared with the prototypes: (N, D) -> (N, E)."""
        return F.normalize(self.mlp(features), dim=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(features))  # type: ignore[no-any-return]
