"""The input pipeline alone: two views an image, 32 px from memory and 224 px from JPEG files, without a network."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Result, answer, timed
from pictures import file_paths, folder
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1

# On a machine that does other work: seconds of this process on one core, without workers.
ONE_CORE = "ONE_CORE" in os.environ
SMALL, LARGE, WORKERS = 32, 224, 0 if ONE_CORE else 2
COLOR: dict[str, Any] = {"jitter": [0.4, 0.4, 0.4, 0.1], "jitter_p": 0.8, "grayscale": 0.2, "flip": 0.5}
CROP: dict[str, Any] = {"count": 2, "crop_scale": [0.08, 1.0]}
PHOTO = ((500, 375), 600)  # about the size of ImageNet's


def rate(batches: Iterator[Any], size: int) -> Result:
    """Over many batches, since prefetched ones seem to cost nothing."""
    clock = time.process_time if ONE_CORE else time.perf_counter
    return timed(lambda: [next(batches) for _ in range(8)], images=8 * size, seconds=15.0, warmup=1, clock=clock)


def ours(views: dict[str, Any], *, files: bool, batch: int, normalize: bool = True) -> Result:
    from sslcli.data.loader import Loader
    from sslcli.data.sources.base import Shapes, Source
    from sslcli.data.sources.files import Folder
    from sslcli.data.views.views import Views
    from sslcli.system.memory import keep_freed_memory

    keep_freed_memory()
    source: Source = Shapes(image_size=SMALL, train_images=4096, test_images=0)
    if files:
        source = Folder(root=str(folder(*PHOTO)), image_size=LARGE, workers=WORKERS)
    made = Views([views], normalize=normalize)
    loader = Loader(source, made, batch_size=batch, accumulate=1, seed=0, device=torch.device("cpu"))
    return rate(loader.steps(0, 10**9), batch)


class InMemory(Dataset[Any]):
    """PIL images or paths under a peer's transform."""

    def __init__(self, images: list[Image.Image] | list[Path], transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, number: int) -> Any:
        image = self.images[number % len(self.images)]
        return self.transform(image if isinstance(image, Image.Image) else Image.open(image).convert("RGB"))


def peer(transform: Any, *, files: bool, batch: int) -> Result:
    """A transform an image in a DataLoader of two workers, as peers do it."""
    from sslcli.data.sources.base import Shapes

    if files:
        data = InMemory(file_paths(folder(*PHOTO)), transform)
    else:
        drawn = Shapes(image_size=SMALL, train_images=4096, test_images=0).images
        assert drawn is not None
        data = InMemory([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in drawn], transform)
    loader = DataLoader(data, batch_size=batch, num_workers=WORKERS)
    return rate(iter(loader), batch)


def twice(*steps: Any) -> Any:
    one = v1.Compose([*steps, v1.ToTensor()])
    return lambda image: (one(image), one(image))


def lightly(size: int, *, blur: float) -> Any:
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(input_size=size, gaussian_blur=blur, cj_strength=0.5)


if __name__ == "__main__":
    if ONE_CORE:
        torch.set_num_threads(1)
    blur = {"blur": 0.5}
    jitter = v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    small = {"files": False, "batch": 256}
    large = {"files": True, "batch": 32}
    answer(
        {
            "memory_32/sslcli": partial(ours, CROP | COLOR, **small),
            "memory_32/lightly": lambda: peer(lightly(SMALL, blur=0.0), **small),
            "memory_32/torchvision": lambda: peer(
                twice(v1.RandomResizedCrop(SMALL), v1.RandomHorizontalFlip(), jitter, v1.RandomGrayscale(0.2)), **small
            ),
            "crops_224/sslcli": partial(ours, CROP | {"flip": 0.0}, normalize=False, **large),
            "crops_224/torchvision": lambda: peer(twice(v1.RandomResizedCrop(LARGE)), **large),
            "simclr_224/sslcli": partial(ours, CROP | COLOR | blur, **large),
            "simclr_224/lightly": lambda: peer(lightly(LARGE, blur=0.5), **large),
        }
    )
