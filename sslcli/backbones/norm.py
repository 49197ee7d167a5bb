"""The normalisation of a convolutional backbone, one word for each."""

from __future__ import annotations

from torch import nn

NORMS = ("batch", "layer", "none")


def norm_layer(norm: str, channels: int) -> nn.Module:
    """A layer for maps (N, channels, H, W).

    batch: BatchNorm. layer: over channels and positions of one image, GroupNorm with one group, so that no image tells
    of another. none: the identity. Raises ValueError for any other word.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm is {norm!r}, but it must be one of: {', '.join(NORMS)}")
