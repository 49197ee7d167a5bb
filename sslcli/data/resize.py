"""Crops of bytes resized with antialiasing, compiled: `resize.c`. `augment.resized_crop` asks here first."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sslcli import compiled
from sslcli.compiled import INT, LONG, POINTER

PART = Path(__file__).with_suffix(".c")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled pass, or None."""
    return compiled.load(PART, {"resized_crops": [POINTER] * 4 + [LONG] * 6 + [INT] * 2})


def resized_crops(images: Tensor, boxes: Tensor, size: int, *, cubic: bool, channels_last: bool) -> Tensor | None:
    """A box of each image at (size, size), in one pass over its pixels; None where there is no pass for such images.

    Args:
        images: uint8 on the CPU, (N, C, H, W), or (N, H, W, C) with `channels_last`.
        boxes: (N, 4) int64 top, left, height, width, inside of the image, height and width at least 1.

    Returns:
        (N, C, size, size) float32 in [0, 1].
    """
    passes = library() if images.dtype == torch.uint8 and images.device.type == "cpu" else None
    if passes is None:
        return None
    count, planes, height, width, together = (images.unsqueeze(1) if channels_last else images.unsqueeze(4)).shape
    threads = min(torch.get_num_threads(), max(1, count))
    scratch = torch.empty(threads, size * (width * together + height + width))
    out = torch.empty(count, planes * together, size, size)
    images, boxes = images.contiguous(), boxes.contiguous()
    assert boxes.dtype == torch.int64
    pointers = (each.data_ptr() for each in (images, boxes, out, scratch))
    passes.resized_crops(*pointers, count, planes, height, width, together, size, cubic, threads)
    return out
