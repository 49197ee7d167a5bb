"""Compiled cropping and antialiased resizing of uint8 images (`resize.c`), used by `augment.resized_crop`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sslcli.kernels import library as compiled
from sslcli.kernels.library import INT, LONG, POINTER

PART = Path(__file__).with_suffix(".c")


@cache
def library() -> ctypes.CDLL | None:
    """Return the library compiled from `resize.c`, or None if it is not available."""
    return compiled.load(PART, {"resized_crops": [POINTER] * 5 + [LONG] * 6 + [INT] * 2})


def resized_crops(images: Tensor, boxes: Tensor, size: int, *, cubic: bool) -> Tensor | None:
    """Crop a box from each image and resize it to (size, size). Return None if the kernel cannot be used.

    The kernel cannot be used if it was not compiled, if `images` is not uint8, or if `images` is not on the CPU.

    Args:
        images: (N, C, H, W).
        boxes: (N, 4) int64: top, left, height, width. Boxes must be inside the image, with height and width above 0.
        size: side of the result in pixels.
        cubic: True for bicubic, False for bilinear interpolation.

    Returns:
        (N, C, size, size) float32 in [0, 1].
    """
    if images.dtype != torch.uint8 or images.device.type != "cpu" or library() is None:
        return None
    count, channels, height, width = images.shape
    out = torch.empty(count, channels, size, size)
    _cut(images.contiguous(), boxes, out, (channels, height, width, 1), size, cubic)
    return out


def resized_bytes(pictures: Tensor, boxes: Tensor, size: int, *, cubic: bool) -> Tensor:
    """Crop a box from each picture and resize it: (N, H, W, C) uint8 -> (N, C, size, size) uint8.

    Call this function only if `library()` is not None. For `boxes`, `size` and `cubic`, see `resized_crops`.
    """
    count, height, width, channels = pictures.shape
    out = torch.empty(count, channels, size, size, dtype=torch.uint8)
    if channels == 3:
        _cut(pictures.contiguous(), boxes, out, (1, height, width, channels), size, cubic)
    else:  # the C code supports interleaved channels only for three channels
        _cut(pictures.permute(0, 3, 1, 2).contiguous(), boxes, out, (channels, height, width, 1), size, cubic)
    return out


def _cut(images: Tensor, boxes: Tensor, out: Tensor, shape: tuple[int, int, int, int], size: int, cubic: bool) -> None:
    """Crop a box from each image, resize it, and write the result to `out`, in float32 or uint8.

    `shape` is (planes, height, width, channels per plane) of each image. A plane is a contiguous part of the image in
    memory: one channel, or three channels that are interleaved. For the other arguments, see `resized_crops`.
    """
    passes = library()
    assert passes is not None
    assert boxes.dtype == torch.int64
    _, height, width, together = shape
    threads = min(torch.get_num_threads(), max(1, len(boxes)))
    scratch = torch.empty(threads, width * together + 1 + size * (together + 4 + height + width))
    boxes = boxes.contiguous()
    numbers, given = (out.data_ptr(), None) if out.is_floating_point() else (None, out.data_ptr())
    pointers = (images.data_ptr(), boxes.data_ptr(), numbers, given, scratch.data_ptr())
    passes.resized_crops(*pointers, len(boxes), *shape, size, cubic, threads)
