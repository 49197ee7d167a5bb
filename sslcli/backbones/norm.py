"""Normalization layers of convolutional backbones, by name."""

from __future__ import annotations

from torch import nn

NORMS = ("batch", "layer", "none")


def norm_layer(norm: str, channels: int) -> nn.Module:
    """Build the normalization layer named `norm` for feature maps (N, channels, H, W).

    `norm` is one of:
        batch: BatchNorm.
        layer: normalization over channels, height and width of each image (GroupNorm with one group).
        none: identity.

    Raises ValueError for any other name.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm is {norm!r}, but it must be one of: {', '.join(NORMS)}")
