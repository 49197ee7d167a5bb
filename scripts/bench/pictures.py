"""JPEG files for the benchmarks: synthetic images, or real ones from the folders in IMAGES_32 and IMAGES_375."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def image_folder(size: tuple[int, int], count: int) -> Path:
    """Return a directory with one folder of JPEGs per class.

    If the environment variable IMAGES_<shorter side> is set, its value is the directory. Otherwise the directory has
    `count` synthetic images of `size` (width, height); they are written to BENCH_FOLDER or the temporary directory
    unless they exist.
    """
    real_images = os.environ.get(f"IMAGES_{min(size)}")
    if real_images:
        return Path(real_images)
    root = Path(os.environ.get("BENCH_FOLDER", tempfile.gettempdir())) / f"{size[0]}x{size[1]}_{count}"
    if not root.exists():
        from sslcli.data.sources.base import Shapes

        source = Shapes(image_size=64, train_images=count, test_images=0)
        assert source.images is not None
        for number, image in enumerate(source.images):
            path = root / f"class{number % 10}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
            noise = torch.randint(-12, 13, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
            noisy = (torch.from_numpy(np.asarray(resized).astype(np.int16)) + noise).clamp(0, 255)
            Image.fromarray(noisy.byte().numpy()).save(path, quality=90)
    return root


def file_paths(root: Path) -> list[Path]:
    """Return all files below `root`, sorted."""
    return sorted(path for path in root.rglob("*") if path.is_file())
