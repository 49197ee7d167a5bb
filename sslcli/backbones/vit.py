"""Vision Transformer with fixed 2-D sin-cos position embedding, initialized as in MoCo v3.

Dosovitskiy et al. 2021  https://arxiv.org/abs/2010.11929     Chen, Xie, He 2021  https://arxiv.org/abs/2104.02057
conf/backbone/vit_tiny.yaml, vit_small.yaml, vit_base.yaml

The parameters have the same names as in timm's VisionTransformer. sslcli can load weights of timm, and timm can load
weights of sslcli. sslcli can also load weights of the official MoCo v3.

Shapes: N images, P patches, T = 1 + P tokens (class token and patches), D width, H heads, K width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.errors import check_positive

POOLS = ("cls", "mean")


def position_embedding(
    height: int,
    width: int,
    dim: int,
    *,
    trained: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the sin-cos embedding of a patch grid, (height * width, dim) float32 (MoCo v3, section 3).

    The patches are ordered row by row.

    `dim` must be divisible by 4. The four quarters of `dim` hold sin(row), cos(row), sin(column) and cos(column), each
    at several frequencies. Frequency i is 10000^(-i / (dim / 4)).

    `trained` = (rows, columns) is the patch grid used in training. For another grid, the patch centers are scaled to
    the coordinates of the training grid. Their embedding is then computed exactly, without interpolation.
    """
    quarter = dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, device=device) / quarter)
    rows, columns = trained or (height, width)
    row = (torch.arange(height, device=device) + 0.5) * rows / height - 0.5
    column = (torch.arange(width, device=device) + 0.5) * columns / width - 0.5
    row_angle = (row[:, None] * frequency)[:, None].expand(height, width, quarter)
    column_angle = (column[:, None] * frequency)[None].expand(height, width, quarter)
    parts = [row_angle.sin(), row_angle.cos(), column_angle.sin(), column_angle.cos()]
    return torch.cat(parts, dim=2).reshape(height * width, dim)


def choose_patch_size(image_size: int) -> int:
    """Return the patch size: the divisor of `image_size` that is nearest to image_size / 14.

    The divisor must be at least 4 and give at least 4 x 4 patches. Examples: 224 -> 16, 96 -> 6, 64 -> 4, 32 -> 4.

    Raises ValueError if there is no such divisor.
    """
    divisors = [size for size in range(4, image_size // 4 + 1) if image_size % size == 0]
    if not divisors:
        raise ValueError(
            f"no patch size of at least 4 divides image_size={image_size} into 4 x 4 patches or more: "
            "set patch_size, or use an image_size that is a multiple of 16"
        )
    return min(divisors, key=lambda size: abs(size - image_size / 14))


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
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear layers with GELU in between, applied to each token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Stochastic depth: drop the residual branch of each image with probability `drop_prob` (arXiv:1603.09382)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep) / keep


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with LayerNorm and a residual connection."""

    def __init__(self, width: int, *, num_heads: int, hidden: int, drop_prob: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)
        self.drop_path = DropPath(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Linear projection of every patch: (N, C, H, W) -> (N, D, H / patch_size, W / patch_size)."""

    def __init__(self, in_channels: int, width: int, *, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images of {height} x {width} pixels do not divide into patches of {self.patch_size}: "
                "set the size of the view to a multiple of the patch size, or change patch_size"
            )
        return self.proj(images)  # type: ignore[no-any-return]


class VisionTransformer(Backbone):
    """Vision Transformer with num_features = `width`.

    Args:
        image_size: side of the training images in pixels, a multiple of `patch_size`. Images of another size are
            accepted, such as the small crops of multi-crop. Their side must also be a multiple of `patch_size`. The
            position embedding is scaled to their size.
        patch_size: side of a patch in pixels. None selects a value near image_size / 14, see `choose_patch_size`.
        width: token width, divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the MLP divided by `width`.
        in_channels: image channels.
        frozen_patch_projection: do not train the randomly initialized patch projection. This improves stability
            (MoCo v3, section 4.2).
        pool: "cls" selects the class token, and "mean" selects the mean over patches. Both follow the final LayerNorm.
        drop_path: stochastic depth rate of the last block, in [0, 1). The rate of the first block is 0, and the rate
            increases linearly with depth.

    Raises ValueError for arguments out of range.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int | None,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4,
        in_channels: int = 3,
        frozen_patch_projection: bool = False,
        pool: str = "cls",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(image_size=image_size, width=width, depth=depth, num_heads=num_heads, in_channels=in_channels)
        patch_size = choose_patch_size(image_size) if patch_size is None else patch_size
        check_positive(patch_size=patch_size)
        check_values(image_size, patch_size, width, num_heads, mlp_ratio, pool, drop_path)
        grid = image_size // patch_size
        self.num_features = width
        self.grid = (grid, grid)
        self.pool = pool
        self.patch_embed = PatchEmbed(in_channels, width, patch_size=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = torch.cat([torch.zeros(1, width), position_embedding(grid, grid, width)])
        self.register_buffer("pos_embed", positions[None])
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        hidden = round(width * mlp_ratio)
        self.blocks = nn.Sequential(
            *(Block(width, num_heads=num_heads, hidden=hidden, drop_prob=rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.init_weights()
        self.patch_embed.proj.requires_grad_(not frozen_patch_projection)

    def init_weights(self) -> None:
        """Initialize the parameters as in MoCo v3.

        Weights are Xavier-uniform (q, k and v separately), biases are zero, and the class token is normal with a
        standard deviation of 1e-6.
        """
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                fan_out = layer.out_features // 3 if name.endswith("qkv") else layer.out_features
                bound = math.sqrt(6 / (layer.in_features + fan_out))
                nn.init.uniform_(layer.weight, -bound, bound)
                nn.init.zeros_(layer.bias)
        patches = self.patch_embed.proj
        bound = math.sqrt(6 / (patches.weight[0].numel() + patches.out_channels))
        nn.init.uniform_(patches.weight, -bound, bound)
        assert patches.bias is not None
        nn.init.zeros_(patches.bias)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Return features: (N, in_channels, H, W) -> (N, width)."""
        tokens, _ = self.tokens(images)
        return tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(1)

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Return {"patches": map}, where the map contains the patch tokens after the final LayerNorm.

        The map has shape (N, width, H / patch_size, W / patch_size).
        """
        tokens, grid = self.tokens(images)
        return {"patches": tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, *grid)}

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return all tokens after the final LayerNorm, and the patch grid (rows, columns).

        The tokens are (N, 1 + P, width). The class token comes first.
        """
        maps = self.patch_embed(images)
        grid = (maps.shape[2], maps.shape[3])
        x = maps.permute(0, 2, 3, 1).flatten(1, 2)  # (N, P, D), without a copy for channels_last maps
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(grid)
        return self.norm(self.blocks(x)), grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position embedding (1, 1 + P, width) of the class token and P patches.

        The patches form a grid (rows, columns), so P is rows * columns. The embedding of the class token is zero.
        """
        if grid == self.grid:
            return self.pos_embed
        device, dtype = self.pos_embed.device, self.pos_embed.dtype
        stretched = position_embedding(*grid, self.num_features, trained=self.grid, device=device)
        return torch.cat([self.pos_embed[:, :1], stretched[None].to(dtype)], dim=1)


def check_values(
    image_size: int, patch_size: int, width: int, num_heads: int, mlp_ratio: float, pool: str, drop_path: float
) -> None:
    """Raise ValueError if arguments of `VisionTransformer` are incompatible or out of range.

    The message states what to change.
    """
    if image_size % patch_size:
        divisors = [size for size in range(2, image_size // 2 + 1) if image_size % size == 0]
        raise ValueError(
            f"image_size={image_size} is not divisible by patch_size={patch_size}: "
            f"set patch_size to {', '.join(map(str, divisors)) or image_size}, or to null to choose it automatically"
        )
    if width % 4 or width % num_heads:
        raise ValueError(
            f"width={width} must be divisible by 4 (for the position embedding) and by num_heads={num_heads}: "
            "use num_heads=4 and a multiple of 4, or change the width"
        )
    if not mlp_ratio > 0:
        raise ValueError(f"mlp_ratio is {mlp_ratio}, but it must be greater than 0")
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}, but it must be one of: {', '.join(POOLS)}")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is {drop_path}, but it must be at least 0 and less than 1")
