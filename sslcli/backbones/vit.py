"""Vision Transformer with fixed 2-D sin-cos position embedding, initialized as in MoCo v3.

Dosovitskiy et al. 2021  https://arxiv.org/abs/2010.11929     Chen, Xie, He 2021  https://arxiv.org/abs/2104.02057
conf/backbone/vit_tiny.yaml, vit_small.yaml, vit_base.yaml

The parameters have the same names as in timm's VisionTransformer. sslcli can load weights of timm, and timm can load
weights of sslcli. sslcli can also load weights of the official MoCo v3.

Shapes: N images, P patches, T tokens (class token, registers and patches), D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.errors import check_positive
from sslcli.nn.masks import take_patches
from sslcli.nn.noise import Noise
from sslcli.nn.transformer import Block, init_linear

POOLS = ("cls", "mean")
SINCOS_TOLERANCE = 1e-2  # difference of stored sin-cos embeddings, which bfloat16 rounds by up to 4e-3


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


def interpolated_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Return a position embedding (1, T + P, D) for the patch grid `new` (rows, columns) instead of `old`.

    The rows of T leading tokens, such as the class token, are kept. Those of the P patches are resized with antialiased
    bicubic interpolation, as in timm, in float32.
    """
    others = positions.shape[1] - old[0] * old[1]
    first, patches = positions[:, :others], positions[:, others:]
    maps = patches.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    return torch.cat([first, maps.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], dim=1)


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


def masked(patches: Tensor, mask: Tensor, mask_token: Tensor | None) -> Tensor:
    """Return the patch embeddings (N, P, D), with the masked ones replaced by `mask_token`.

    `mask` is (N, P) bool, and True means masked. Raises ValueError if `mask_token` is None or `mask` has another shape.
    """
    if mask_token is None:
        raise ValueError("mask is given without mask_token: pass the tensor that replaces the masked patches")
    if mask.shape != patches.shape[:2]:
        raise ValueError(f"mask has the shape {tuple(mask.shape)}, but the patches have {tuple(patches.shape[:2])}")
    return torch.where(mask[..., None], mask_token, patches)


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
        registers: number of register tokens, which have no position and are not part of the features
            (arXiv:2309.16588).
        layer_scale: initial value of a trained factor per channel of each residual branch (arXiv:2103.17239). None adds
            no factors.

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
        registers: int = 0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        check_positive(image_size=image_size, width=width, depth=depth, num_heads=num_heads, in_channels=in_channels)
        patch_size = choose_patch_size(image_size) if patch_size is None else patch_size
        check_positive(patch_size=patch_size)
        check_values(image_size, patch_size, width, num_heads, mlp_ratio, pool, drop_path, registers, layer_scale)
        grid = image_size // patch_size
        self.num_features = width
        self.patch_size = patch_size
        self.num_prefix_tokens = 1 + registers
        self.grid = (grid, grid)
        self.pool = pool
        self.patch_embed = PatchEmbed(in_channels, width, patch_size=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        positions = torch.cat([torch.zeros(1, width), position_embedding(grid, grid, width)])
        self.register_buffer("pos_embed", positions[None])
        self.has_sincos_positions = True  # False after weights with another position embedding were loaded
        self.noise = Noise() if drop_path else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        hidden = round(width * mlp_ratio)
        self.blocks = nn.Sequential(
            *(
                Block(width, num_heads=num_heads, hidden=hidden, drop_prob=rate, layer_scale=layer_scale)
                for rate in rates
            )
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.init_weights()
        self.patch_embed.proj.requires_grad_(not frozen_patch_projection)

    def init_weights(self) -> None:
        """Initialize the parameters as in MoCo v3.

        Weights are Xavier-uniform (q, k and v separately), biases are zero, and the class token and the registers are
        normal with a standard deviation of 1e-6.
        """
        init_linear(self)
        patches = self.patch_embed.proj
        bound = math.sqrt(6 / (patches.weight[0].numel() + patches.out_channels))
        nn.init.uniform_(patches.weight, -bound, bound)
        assert patches.bias is not None
        nn.init.zeros_(patches.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Return features: (N, in_channels, H, W) -> (N, width)."""
        tokens, _ = self.tokens(images)
        return tokens[:, 0] if self.pool == "cls" else tokens[:, self.num_prefix_tokens :].mean(1)

    def tokens(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens after the final LayerNorm, and the patch grid (rows, columns). See `Backbone.tokens`.

        The tokens are (N, num_prefix_tokens + P, width). The class token comes first, then the registers.
        """
        maps = self.patch_embed(images)
        grid = (maps.shape[2], maps.shape[3])
        patches = maps.permute(0, 2, 3, 1).flatten(1, 2)  # without a copy for channels_last maps
        if mask is not None:
            patches = masked(patches, mask, mask_token)
        x = self.input_tokens(patches, grid, keep=keep)
        for block, kept in zip(self.blocks, self.kept_branches(x.shape[0], x.device), strict=True):
            x = block(x, kept)
        return self.norm(x), grid

    def input_tokens(self, patches: Tensor, grid: tuple[int, int], *, keep: Tensor | None = None) -> Tensor:
        """Return the input of the first block: class token, registers and patches, with positions.

        `patches` are the embeddings (N, P, width) of the patch `grid` (rows, columns). `keep` (N, K) int64 has the
        indices of the patches in the result, None = all. The registers have no position.
        """
        positions = self.positions(grid)
        patches = patches + positions[:, 1:]
        if keep is not None:
            patches = take_patches(patches, keep)
        first = [self.cls_token + positions[:, :1], *([] if self.reg_token is None else [self.reg_token])]
        num_images = patches.shape[0]  # len(patches) would be a constant in an exported graph
        return torch.cat([*(token.expand(num_images, -1, -1) for token in first), patches], dim=1)

    def kept_branches(self, num_images: int, device: torch.device) -> Iterable[Tensor | None]:
        """Draw the images whose residual branches are not dropped: for each block, (2, N) bool or None = all images.

        See `Block`. The random numbers do not depend on the number of processes.
        """
        rates = [float(block.drop_prob) for block in self.blocks]  # type: ignore[arg-type]
        if self.noise is None or not self.training or not any(rates):
            return [None] * len(rates)
        numbers = self.noise.uniform(num_images, len(rates), 2, device=device).permute(1, 2, 0)
        return [number >= rate if rate else None for number, rate in zip(numbers, rates, strict=True)]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position embedding (1, 1 + P, width) of the class token and P patches.

        The patches form a grid (rows, columns), so P is rows * columns. The embedding of the class token is zero.

        For another grid than that of the training images, the sin-cos embedding is computed exactly. If the weights
        contain another embedding, it is interpolated.
        """
        if grid == self.grid:
            return self.pos_embed
        if not self.has_sincos_positions:
            return interpolated_positions(self.pos_embed, self.grid, grid)
        device, dtype = self.pos_embed.device, self.pos_embed.dtype
        stretched = position_embedding(*grid, self.num_features, trained=self.grid, device=device)
        return torch.cat([self.pos_embed[:, :1], stretched[None].to(dtype)], dim=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the state dict, and note whether its position embedding is the sin-cos embedding of this network."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        loaded = self.pos_embed[0, 1:]
        if not loaded.is_meta:
            exact = position_embedding(*self.grid, self.num_features, device=loaded.device)
            self.has_sincos_positions = torch.allclose(loaded.float(), exact, atol=SINCOS_TOLERANCE)


def check_values(
    image_size: int,
    patch_size: int,
    width: int,
    num_heads: int,
    mlp_ratio: float,
    pool: str,
    drop_path: float,
    registers: int,
    layer_scale: float | None,
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
    if registers < 0:
        raise ValueError(f"registers is {registers}, but it must be at least 0; DINOv2 uses 0 or 4")
    if layer_scale is not None and not layer_scale > 0:
        raise ValueError(f"layer_scale is {layer_scale}, but it must be null or greater than 0; DINOv2 uses 1e-5")
