"""Batches of noisy images for the tests of the view operations."""

from __future__ import annotations

import torch
from torch import Tensor


def noisy_images(count: int = 16, size: int = 24, *, width: int | None = None, seed: int = 0) -> Tensor:
    """Noise with gray, saturated, black and white images among it, where the branches of the color operations meet."""
    images = torch.rand(count, 3, size, width or size, generator=torch.Generator().manual_seed(seed))
    images[1] = images[1, :1]
    images[2] = images[2].round()
    images[3, :, : size // 2] = 0.0
    images[3, :, size // 2 :] = 1.0
    return images


def uniform(low: float, high: float, count: int = 16, seed: int = 1) -> Tensor:
    """`count` random numbers in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed))
