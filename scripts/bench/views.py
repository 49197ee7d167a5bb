"""Benchmark of the input pipeline without a network: two views per image, 32 px from memory and 224 px from JPEGs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Result, run_benchmark, timed
from pictures import file_paths, image_folder
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1

# Measure the CPU time of one process without workers, which is valid on a machine under other load as well.
ONE_CORE = "ONE_CORE" in os.environ
SMALL, LARGE, WORKERS = 32, 224, 0 if ONE_CORE else 2
COLOR: dict[str, Any] = {"jitter": [0.4, 0.4, 0.4, 0.1], "jitter_p": 0.8, "grayscale": 0.2, "flip": 0.5}
CROP: dict[str, Any] = {"count": 2, "crop_scale": [0.08, 1.0]}
PHOTO = ((500, 375), 600)  # (width, height), about the size of ImageNet's images, and number of files


def throughput(batches: Iterator[Any], size: int) -> Result:
    """Time 8 batches of `size` images together, since a single batch may have been prefetched and take no time."""
    clock = time.process_time if ONE_CORE else time.perf_counter
    return timed(lambda: [next(batches) for _ in range(8)], images=8 * size, seconds=15.0, warmup=1, clock=clock)


def sslcli_views(view: dict[str, Any], *, files: bool, batch: int, normalize: bool = True) -> Result:
    """Measure sslcli's loader with two views of one distribution, from files or from memory."""
    from sslcli.data.loader import Loader
    from sslcli.data.sources.base import Shapes, Source
    from sslcli.data.sources.files import Folder
    from sslcli.data.views.views import Views
    from sslcli.system.memory import keep_freed_memory

    keep_freed_memory()
    source: Source = Shapes(image_size=SMALL, train_images=4096, test_images=0)
    if files:
        source = Folder(root=str(image_folder(*PHOTO)), image_size=LARGE, workers=WORKERS)
    views = Views([view], normalize=normalize)
    loader = Loader(source, views, batch_size=batch, accumulate=1, seed=0, device=torch.device("cpu"))
    return throughput(loader.steps(0, 10**9), batch)


class TransformedImages(Dataset[Any]):
    """Endless dataset of PIL images or image files with a transform of another library."""

    def __init__(self, images: list[Image.Image] | list[Path], transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, number: int) -> Any:
        image = self.images[number % len(self.images)]
        return self.transform(image if isinstance(image, Image.Image) else Image.open(image).convert("RGB"))


def data_loader(transform: Any, *, files: bool, batch: int) -> Result:
    """Measure torch's DataLoader with two workers and one call of the transform per image."""
    from sslcli.data.sources.base import Shapes

    if files:
        data = TransformedImages(file_paths(image_folder(*PHOTO)), transform)
    else:
        images = Shapes(image_size=SMALL, train_images=4096, test_images=0).images
        assert images is not None
        data = TransformedImages([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], transform)
    loader = DataLoader(data, batch_size=batch, num_workers=WORKERS)
    return throughput(iter(loader), batch)


def two_views(*steps: Any) -> Any:
    """Return a transform that applies torchvision's `steps` twice to an image."""
    one = v1.Compose([*steps, v1.ToTensor()])
    return lambda image: (one(image), one(image))


def lightly_transform(size: int, *, blur: float) -> Any:
    """Return lightly's transform of SimCLR: two views of `size` pixels, blurred with probability `blur`."""
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(input_size=size, gaussian_blur=blur, cj_strength=0.5)


if __name__ == "__main__":
    if ONE_CORE:
        torch.set_num_threads(1)
    blur = {"blur": 0.5}
    jitter = v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    small = {"files": False, "batch": 256}
    large = {"files": True, "batch": 32}
    torchvision_views = two_views(
        v1.RandomResizedCrop(SMALL), v1.RandomHorizontalFlip(), jitter, v1.RandomGrayscale(0.2)
    )
    run_benchmark(
        {
            "memory_32/sslcli": partial(sslcli_views, CROP | COLOR, **small),
            "memory_32/lightly": lambda: data_loader(lightly_transform(SMALL, blur=0.0), **small),
            "memory_32/torchvision": partial(data_loader, torchvision_views, **small),
            "crops_224/sslcli": partial(sslcli_views, CROP | {"flip": 0.0}, normalize=False, **large),
            "crops_224/torchvision": partial(data_loader, two_views(v1.RandomResizedCrop(LARGE)), **large),
            "simclr_224/sslcli": partial(sslcli_views, CROP | COLOR | blur, **large),
            "simclr_224/lightly": lambda: data_loader(lightly_transform(LARGE, blur=0.5), **large),
        }
    )
