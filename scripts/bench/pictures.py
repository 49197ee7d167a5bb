"""Image files for the benchmarks: drawn ones, unless IMAGES names a class folder of real ones."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def folder(size: tuple[int, int], count: int) -> Path:
    """A class folder of JPEGs: that of IMAGES_<shorter side> if set, else `count` drawn ones of (width, height)."""
    given = os.environ.get(f"IMAGES_{min(size)}")
    if given:
        return Path(given)
    root = Path(os.environ.get("BENCH_FOLDER", tempfile.gettempdir())) / f"{size[0]}x{size[1]}_{count}"
    if not root.exists():
        from sslcli.data.sources.base import Shapes

        source = Shapes(image_size=64, train_images=count, test_images=0)
        assert source.images is not None
        for number, image in enumerate(source.images):
            path = root / f"class{number % 10}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
            grain = torch.randint(-12, 13, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
            noisy = (torch.from_numpy(np.asarray(drawn).astype(np.int16)) + grain).clamp(0, 255)
            Image.fromarray(noisy.byte().numpy()).save(path, quality=90)
    return root


def file_paths(root: Path) -> list[Path]:
    """Its files in order."""
    return sorted(path for path in root.rglob("*") if path.is_file())
