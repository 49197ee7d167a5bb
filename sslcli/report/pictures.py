"""Picture grids and picture files, such as a grid of source images and their views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def grid(rows: list[Tensor], *, gap: int = 2, smallest: int = 64) -> Tensor:
    """Return one picture (3, H', W') with images in a grid. Each element of `rows` is one row (n, C, H, W) in [0, 1].

    For images with one or two channels, the first channel is shown in gray. For images with more than three channels,
    the first three channels are shown in color. Image sizes may differ between rows. All images are resized to the
    largest of these sizes, or to `smallest` pixels if that is larger. `gap` is the number of white pixels between
    images.
    """
    side = max(smallest, *(row.shape[-1] for row in rows))
    lines = []
    for row in rows:
        images = F.interpolate(row.float(), size=(side, side), mode="nearest")
        images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        tiles = F.pad(images, [0, gap, 0, gap], value=1.0)  # (n, 3, side + gap, side + gap)
        lines.append(torch.cat(list(tiles), dim=2))
    return torch.cat(lines, dim=1)


def save(picture: Tensor, path: Path) -> None:
    """Write a (3, H, W) picture in [0, 1] to a file. The suffix of the file selects the format."""
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)


def load(path: Path) -> Tensor:
    """Return the picture in a file as (3, H, W) in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
