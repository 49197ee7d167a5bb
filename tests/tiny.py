"""Networks and batches for fast tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslcli.backbones.vit import VisionTransformer
from sslcli.distributed import collectives
from sslcli.methods.base import Batch


class TinyNet(nn.Module):
    """One convolution, with BatchNorm or without, and the mean over positions: (N, 3, H, W) -> (N, 8)."""

    num_features = 8

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(images))).mean((2, 3))


class Rows(nn.Module):
    """A backbone whose images are rows of features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        return images


def make_batch(
    num_images: int = 8, *, views: int = 2, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Batch:
    """Return a batch of `views` noisy copies of random images, so that views of one image are similar."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, size, size, generator=generator, dtype=torch.float64)
    noisy = [images + torch.randn(images.shape, generator=generator, dtype=torch.float64) / 2 for _ in range(views)]
    label = torch.arange(num_images) % 2
    return Batch([view.to(dtype) for view in noisy], torch.arange(num_images), label)


def multi_crop_batch(num_images: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    """Two views of 8 pixels and two of 4 pixels."""
    batch = make_batch(num_images, views=4, dtype=dtype)
    return Batch([*batch.views[:2], *(view[..., :4, :4] for view in batch.views[2:])], batch.index, batch.label)


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(image_size=8, patch_size=2, width=16, depth=3, num_heads=2, **options)


def mine(batch: Batch) -> Batch:
    def part(rows: Tensor) -> Tensor:
        return rows.chunk(collectives.world_size())[collectives.rank()]

    return Batch([part(view) for view in batch.views], part(batch.index), part(batch.label))


def copied_state(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states of a network are bit-identical."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
