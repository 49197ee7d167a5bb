"""Preprocessing of images as in the evaluations of a run, as plain values for other tools."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREPROCESSING = "preprocessing.json"  # name of the file in an exported folder


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The test transform of a run: resize, center crop, color space, normalization.

    Attributes:
        image_size: side of the square center crop in pixels.
        resized_side: length of the shorter side after the resize, in pixels. It equals `image_size` if all images of
            the dataset are squares of this size.
        mean, std: normalization per channel, for values in [0, 1]. 0 and 1 if images are not normalized.
        color_space: color space of the input of the network, see `Views`.
    """

    image_size: int
    resized_side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    color_space: str = "rgb"

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return len(self.mean)

    @property
    def is_normalized(self) -> bool:
        """True if images are normalized."""
        return any(self.mean) or any(value != 1 for value in self.std)

    @property
    def crop_fraction(self) -> float:
        """Side of the center crop divided by the shorter side, such that floor(image_size / fraction) is exact."""
        fraction = self.image_size / self.resized_side
        return fraction if self.image_size / fraction >= self.resized_side else math.nextafter(fraction, 0)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images (N, C, H, W) in [0, 1]."""
        mean, std = (torch.tensor(values, dtype=images.dtype).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def to_plain(self, *, is_normalized_by_model: bool) -> dict[str, Any]:
        """Return the content of `preprocessing.json`.

        `is_normalized_by_model` is True if the exported model normalizes images itself.
        """
        return {
            "resize_shorter_side": self.resized_side,
            "interpolation": "bilinear",
            "antialias": True,
            "center_crop": self.image_size,
            "images_of_the_crop_size": "neither resized nor cropped",
            "channels": self.channels,
            "value_range": [0.0, 1.0],
            "color_space": self.color_space,
            "mean": list(self.mean),
            "std": list(self.std),
            "normalization": "by the model" if is_normalized_by_model else "by the caller",
        }
