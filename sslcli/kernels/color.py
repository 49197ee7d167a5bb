"""Color augmentations in one compiled pass per image (`color.c`).

`sslcli.data.views.views.Views.color` uses this kernel if the kernel is available and supports the images. Otherwise,
`Views.color` uses the torch operations in `sslcli.data.views.augment`. They process whole batches and give the same
result as the kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sslcli.kernels import library as compiled
from sslcli.kernels.library import INT, LONG, POINTER

PART = Path(__file__).with_suffix(".c")


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of the color augmentations for each of N images.

    The augmentations are applied in the order of the fields: flip, color jitter, conversion to gray, blur,
    solarization. If `gray_first` is True, the conversion to gray comes before the jitter. A bool tensor is True for the
    images to which an augmentation is applied.
    """

    flipped: Tensor  # (N,) bool, True for a left-right flip
    jittered: Tensor  # (N,) bool
    factors: Tensor  # (N, 4), see `sslcli.data.views.color.color_jitter`
    order: Tensor  # (N, 4) int64, see `sslcli.data.views.color.color_jitter`
    gray: Tensor  # (N,) bool
    gray_first: bool
    blurred: Tensor  # (N,) bool
    sigma: Tensor  # (N,) standard deviation of the blur in pixels
    taps: int  # length of the blur kernel in pixels
    solarized: Tensor  # (N,) bool
    threshold: float  # solarization inverts the values >= threshold


@cache
def library() -> ctypes.CDLL | None:
    """Return the library compiled from `color.c`, or None if it is not available."""
    return compiled.load(PART, {"color_operations": [POINTER] * 9 + [LONG] * 5 + [ctypes.c_float] + [INT] * 2})


def color_operations(
    images: Tensor, chosen: Parameters, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor | None:
    """Apply flip, color jitter, conversion to gray, blur and solarization to images, then normalize them.

    Return None if the kernel does not support the images.

    Args:
        images: (N, C, H, W) float32 in [0, 1] on the CPU, C = 1 or 3.
        chosen: for each image, which operations are applied and with which parameters. The blur kernel must fit the
            images, see `augment.check_taps`.
        mean, std: one value per channel for the normalization; std must be above 0.

    Returns:
        (N, C, H, W) in channels-last memory format.
    """
    count, channels, height, width = images.shape
    if images.dtype != torch.float32 or images.device.type != "cpu" or channels not in (1, 3):
        return None
    passes = library()
    if passes is None:
        return None
    flags = torch.stack((chosen.flipped, chosen.jittered, chosen.gray, chosen.blurred, chosen.solarized))
    threads = torch.get_num_threads()
    out = torch.empty(count, height, width, channels)
    given = [
        images.contiguous(),
        out,
        torch.empty(threads, (channels + 1) * height * width + width + chosen.taps),
        flags.to(torch.uint8).contiguous(),
        chosen.factors.float().contiguous(),
        chosen.order.contiguous(),
        chosen.sigma.float().contiguous(),
        torch.tensor(mean, dtype=torch.float32),
        torch.tensor(std, dtype=torch.float32),
    ]
    sizes = (count, channels, height, width, chosen.taps, chosen.threshold, chosen.gray_first, threads)
    passes.color_operations(*(each.data_ptr() for each in given), *sizes)
    return out.permute(0, 3, 1, 2)
