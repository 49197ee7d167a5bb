"""Transformer blocks with LayerScale and stochastic depth, for vision transformers, decoders and predictors.

Dosovitskiy et al. 2021  https://arxiv.org/abs/2010.11929

The parameters have the same names as in timm's blocks.

Shapes: N images, T tokens, D width, H heads, K width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_EXPLICIT_TOKENS = 264  # 16 x 16 patches and the other tokens; with more, the weights need much memory


class Attention(nn.Module):
    """Multi-head self-attention, (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (N, T, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, H, T, K) each
        out = attend(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the softmax attention of queries (N, H, T, K) over keys and values (N, H, S, K), as (N, H, T, K).

    On CPUs, in bfloat16 and with few tokens, forward and backward pass of the two matrix products take a half to a
    seventh of the time of torch's fused attention (docs/performance.md). They need memory for T * S weights per head.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= MAX_EXPLICIT_TOKENS:
        weights: Tensor = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)


class Mlp(nn.Module):
    """Two linear layers with GELU in between, applied to each token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """Trained factor per channel, which starts at `initial` (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def drop_path(branch: Tensor, kept: Tensor | None, drop_prob: float) -> Tensor:
    """Apply stochastic depth to a residual branch (N, T, D) (arXiv:1603.09382).

    `kept` is (N,) bool, and False sets the branch of an image to zero. The branches of the other images are divided by
    1 - `drop_prob`. With `kept=None`, the branch is returned unchanged.
    """
    return branch if kept is None else branch * kept[:, None, None] / (1.0 - drop_prob)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with LayerNorm and a residual connection.

    Args:
        width: token width D.
        num_heads: attention heads.
        hidden: hidden width of the MLP.
        drop_prob: probability that a residual branch of an image is dropped. The caller draws the random numbers, see
            `forward`.
        layer_scale: initial value of `LayerScale`. None adds no `LayerScale`.
    """

    def __init__(
        self, width: int, *, num_heads: int, hidden: int, drop_prob: float = 0.0, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads=num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the output tokens, (N, T, D) -> (N, T, D).

        `kept` is (2, N) bool: the images whose attention branch and MLP branch are not dropped, None = all. The block
        does not draw `kept` itself, because activation checkpointing computes `forward` a second time.
        """
        first, second = (None, None) if kept is None else kept.unbind(0)
        x = x + drop_path(self.ls1(self.attn(self.norm1(x))), first, self.drop_prob)
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), second, self.drop_prob)


def init_linear(module: nn.Module) -> None:
    """Initialize all linear layers of `module`: Xavier-uniform weights (q, k and v separately), biases zero."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            fan_out = layer.out_features // 3 if name.endswith("qkv") else layer.out_features
            bound = math.sqrt(6 / (layer.in_features + fan_out))
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
