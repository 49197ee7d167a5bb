"""Picture grids and picture files, such as the views of a run next to their source images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def grid(rows: list[Tensor], *, gap: int = 2, smallest: int = 64) -> Tensor:
    """Return one picture (3, H', W') with the images in a grid; each element of `rows` is (n, C, H, W) in [0, 1].

    Images with one or two channels show the first channel in gray; images with more than three show the first three in
    color. Image sizes may differ between rows: all are resized to the largest size, at least `smallest` px.
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
    """Write a (3, H, W) picture in [0, 1] to a file; the suffix selects the format."""
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)


def load(path: Path) -> Tensor:
    """Return the picture in a file, (3, H, W) in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
