"""MAE: a vision transformer encodes the visible patches of an image, and a small decoder predicts the masked pixels.

He et al. 2022  https://arxiv.org/abs/2111.06377   conf/method/mae.yaml

Shapes: N images per process, C channels, p pixels per patch side, P patches per image, K visible patches, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.backbones.vit import position_embedding
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features, token_backbone
from sslcli.nn.masks import RandomMask, random_mask, take_patches
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise
from sslcli.nn.transformer import Block, init_linear

PICTURE_SEED = 0  # seed of the masks in saved images; constant, so that the images of all epochs are comparable


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Divide images into patches, (N, C, H, W) -> (N, P, p * p * C).

    The patches are ordered row by row, and the values of a patch by row, column and channel, as in the official code.
    """
    n, c, height, width = images.shape
    cells = images.reshape(n, c, height // patch_size, patch_size, width // patch_size, patch_size)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Return the images of which `patchify` returns `patches`, (N, P, p * p * C) -> (N, C, H, W)."""
    cells = patches.reshape(len(patches), *grid, patch_size, patch_size, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each patch, (N, P, 1) each: the square root of unbiased variance + 1e-6."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def masked_error(prediction: Tensor, patches: Tensor, mask: Tensor, *, normalize: bool) -> Tensor:
    """Return the mean squared error of the masked patches, as a mean over all masked patches of the batch.

    Args:
        prediction: (N, P, p * p * C), the output of the decoder.
        patches: (N, P, p * p * C), the patches of the images, see `patchify`.
        mask: (N, P), 1 or True for masked patches.
        normalize: compare `prediction` with patches of mean 0 and standard deviation 1, see `patch_statistics`.

    The error is computed in float32, or in float64 if the input is float64.
    """
    prediction, patches = full_precision(prediction), full_precision(patches)
    if normalize:
        mean, deviation = patch_statistics(patches)
        patches = (patches - mean) / deviation
    error = (prediction - patches).square().mean(2)
    return (error * mask).sum() / mask.sum()


class PatchDecoder(nn.Module):
    """Transformer decoder from the tokens of visible patches to predictions for all patches.

    Args:
        width: width D of the input tokens.
        grid: rows and columns of patches.
        dim: width of the decoder, divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        out_features: number of predicted values per patch.
        num_prefix_tokens: number of input tokens before the patch tokens. They have no position.
    """

    pos_embed: Tensor

    def __init__(
        self,
        width: int,
        *,
        grid: tuple[int, int],
        dim: int,
        depth: int,
        num_heads: int,
        out_features: int,
        num_prefix_tokens: int,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = torch.cat([torch.zeros(num_prefix_tokens, dim), position_embedding(*grid, dim)])
        self.register_buffer("pos_embed", positions[None], persistent=False)
        self.blocks = nn.Sequential(*(Block(dim, num_heads=num_heads, hidden=4 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, out_features)
        init_linear(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """Return predictions (N, P, out_features).

        `tokens` (N, num_prefix_tokens + K, D) contains the visible patches in the order of `RandomMask.keep`. `restore`
        (N, P) is `RandomMask.restore`.
        """
        x = self.embed(tokens)
        first, visible = x.tensor_split([self.num_prefix_tokens], dim=1)
        masked = self.mask_token.to(x.dtype).expand(len(x), restore.shape[1] - visible.shape[1], -1)
        patches = take_patches(torch.cat([visible, masked], dim=1), restore)
        x = torch.cat([first, patches], dim=1) + self.pos_embed
        return self.predict(self.norm(self.blocks(x))[:, self.num_prefix_tokens :])  # type: ignore[no-any-return]


class MAE(Method):
    """Masked autoencoder for backbones with patch tokens.

    Args:
        image_size: side of the images in pixels.
        channels: image channels C.
        mask_ratio: fraction of masked patches, above 0 and below 1.
        decoder_dim: width of the decoder, divisible by 4 and by `decoder_heads`.
        decoder_depth: number of blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        normalize_pixels: predict patches of mean 0 and standard deviation 1.

    Raises ValueError if an argument is out of range, or if the backbone has no patch tokens.
    """

    num_views = 1
    backbone: Backbone

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalize_pixels: bool = True,
    ) -> None:
        super().__init__(token_backbone(backbone))
        check_positive(decoder_dim=decoder_dim, decoder_depth=decoder_depth, decoder_heads=decoder_heads)
        if decoder_dim % 4 or decoder_dim % decoder_heads:
            raise ValueError(
                f"decoder_dim is {decoder_dim}, but it must be divisible by 4 (for the position embedding) and by "
                f"decoder_heads={decoder_heads}"
            )
        self.patch_size = side_of_patches(self.backbone)
        self.grid = (image_size // self.patch_size, image_size // self.patch_size)
        num_patches = self.grid[0] * self.grid[1]
        if not 0 < mask_ratio < 1 or int(num_patches * (1 - mask_ratio)) < 1:
            raise ValueError(
                f"mask_ratio is {mask_ratio}, but it must be above 0 and below 1, and at least 1 of the {num_patches} "
                "patches must stay visible; MAE uses 0.75"
            )
        self.mask_ratio, self.normalize_pixels = mask_ratio, normalize_pixels
        self.decoder = PatchDecoder(
            num_features(backbone),
            grid=self.grid,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            out_features=self.patch_size**2 * channels,
            num_prefix_tokens=self.backbone.num_prefix_tokens,
        )
        self.noise = Noise()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        numbers = self.noise.uniform(len(images), self.grid[0] * self.grid[1], device=images.device)
        visible = random_mask(numbers, self.mask_ratio)
        tokens, prediction = self.reconstruct(images, visible)
        self.embeddings = (tokens[:, self.backbone.num_prefix_tokens :].detach().mean(1),)
        patches = patchify(images, self.patch_size)
        return {"loss": masked_error(prediction, patches, visible.mask, normalize=self.normalize_pixels)}

    def reconstruct(self, images: Tensor, visible: RandomMask) -> tuple[Tensor, Tensor]:
        """Return the tokens of the visible patches, and the predicted patches (N, P, p * p * C)."""
        tokens, _ = self.backbone.tokens(images, keep=visible.keep)
        return tokens, self.decoder(tokens, visible.restore)

    def check_views(self, views: list[Tensor]) -> None:
        check_size(views[0], self.grid, self.patch_size)

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        generator = torch.Generator().manual_seed(PICTURE_SEED)
        numbers = torch.rand(len(images), self.grid[0] * self.grid[1], generator=generator).to(images.device)
        visible = random_mask(numbers, self.mask_ratio)
        prediction = full_precision(self.reconstruct(images, visible)[1])
        patches = patchify(full_precision(images), self.patch_size)
        if self.normalize_pixels:
            mean, deviation = patch_statistics(patches)
            prediction = prediction * deviation + mean
        return {"reconstruction": masked_rows(images, prediction, visible.mask, self.grid, self.patch_size)}

    def effective(self, batch_size: int) -> dict[str, Any]:
        total = self.grid[0] * self.grid[1]
        return super().effective(batch_size) | {
            "patches": f"{self.grid[0]} x {self.grid[1]} of {self.patch_size} pixels",
            "visible patches": f"{int(total * (1 - self.mask_ratio))} of {total}",
        }


def side_of_patches(backbone: Backbone) -> int:
    """Return the side of a patch in pixels. `token_backbone` has checked that the backbone has patches."""
    assert backbone.patch_size is not None
    return backbone.patch_size


def check_size(view: Tensor, grid: tuple[int, int], patch_size: int) -> None:
    """Raise ValueError unless a view (N, C, H, W) has the patch `grid` for which the method was built."""
    expected = (grid[0] * patch_size, grid[1] * patch_size)
    if tuple(view.shape[2:]) != expected:
        raise ValueError(
            f"the view has {view.shape[2]} x {view.shape[3]} pixels, but the method predicts images of "
            f"{expected[0]} x {expected[1]}: set views.views.0.size to null"
        )


def masked_rows(
    images: Tensor, prediction: Tensor, mask: Tensor, grid: tuple[int, int], patch_size: int
) -> list[Tensor]:
    """Return three rows of images (N, C, H, W) for pictures: original, masked, and masked patches predicted.

    `prediction` is (N, P, p * p * C) in the values of `images`, and `mask` is (N, P), True for masked patches. In the
    second row, masked patches are 0, the mean color of normalized images.
    """
    patches, hidden = patchify(full_precision(images), patch_size), mask[..., None]
    rows = (patches, patches.masked_fill(hidden, 0.0), torch.where(hidden, prediction, patches))
    return [unpatchify(row, grid, patch_size) for row in rows]
