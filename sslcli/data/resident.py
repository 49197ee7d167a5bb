"""Training images of a dataset in memory, in the memory of the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sslcli.data.sources.base import Source

FRACTION = 0.1  # of the free memory of the GPU; larger datasets stay in the memory of the CPU by default
_CHUNK = 4096  # images per copy to the device


def is_resident(source: Source, device: torch.device) -> bool:
    """Return True if the training images are copied to the device once, and not in each step.

    If `dataset.resident` is auto, the device must be a GPU, and the images must fit into a fraction of its free memory.
    """
    if source.images is None or source.resident is False or device.type == "cpu":
        return False
    if source.resident is True:
        return True
    return device.type == "cuda" and resident_bytes(source) <= FRACTION * torch.cuda.mem_get_info(device)[0]


def resident_bytes(source: Source) -> int:
    """Return the number of bytes of the training images of a dataset in memory."""
    assert source.images is not None
    return len(source.splits["train"]) * source.images[0].nbytes


def train_images(source: Source, device: torch.device) -> Tensor:
    """Return the training images on the device: (len(train), C, H, W) uint8, in the order of the split "train"."""
    assert source.images is not None
    positions = source.splits["train"]
    images = torch.empty((len(positions), *source.images.shape[1:]), dtype=source.images.dtype, device=device)
    for target, chunk in zip(torch.split(images, _CHUNK), torch.split(positions, _CHUNK), strict=True):
        target.copy_(source.images[chunk])
    return images
