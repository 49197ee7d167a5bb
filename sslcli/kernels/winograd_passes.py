"""Python interface of the compiled Winograd convolutions in `winograd_passes.c`, loaded by `sslcli.kernels.library`.

`sslcli.kernels.winograd` calls these functions first. If there is no compiled pass, a function returns None or False,
and `sslcli.kernels.winograd` uses torch operations. There is no compiled pass in these cases:

- The dtype is not float32.
- The number of channels is not a multiple of 16 (a cache line).
- The layer is wide: input channels x output channels exceed MOST_KERNELS, or MOST_SUMS in `weight_sums`.
- sslcli was installed without a compiler.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sslcli.kernels import library as compiled
from sslcli.kernels.library import INT, LONG, POINTER

PART = Path(__file__).with_suffix(".c")
POINTS, BLOCK, LINE = 36, 24, 16  # must be equal to the values in winograd_passes.c
MOST_KERNELS = 2**18 // 4  # maximum of input x output channels; larger kernels take too long to read
MOST_SUMS = 2**16 // 4  # maximum of input x output channels in `weight_sums`, where each thread has its own sums
ARGUMENTS = {
    "to_points": [POINTER] * 2 + [LONG] * 4 + [INT],
    "from_points": [POINTER] * 2 + [LONG] * 4 + [INT],
    "gradient_points": [POINTER] * 2 + [LONG] * 4 + [INT],
    "convolve": [POINTER] * 4 + [LONG] * 5 + [INT],
    "weight_sums": [POINTER] * 4 + [LONG] * 5 + [INT],
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it is not available."""
    return compiled.load(PART, ARGUMENTS)


def passes_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the compiled library if it supports the dtype and channels of all `tensors`, else None.

    The channels must be the last dimension of each tensor.
    """
    if all(each.dtype == torch.float32 and each.shape[-1] % LINE == 0 for each in tensors):
        return library()
    return None


def transform(name: str, given: Tensor, out: Tensor, maps: Tensor) -> bool:
    """Apply the compiled transform `name` to `given` and write the result to `out`.

    `maps` (n, H, W, C) is either `given` or `out`, depending on the transform. Return True if there is a compiled
    transform, else False.
    """
    passes = passes_for(maps)
    if passes is None:
        return False
    given = given.contiguous()
    assert out.is_contiguous()
    getattr(passes, name)(given.data_ptr(), out.data_ptr(), *maps.shape, torch.get_num_threads())
    return True


def convolve(maps: Tensor, kernels: Tensor) -> Tensor | None:
    """Return the convolution (n, H, W, O) of `maps` (n, H, W, C) with kernel points `kernels` (36, C, O).

    Each thread processes a few tiles at a time. Return None if there is no compiled pass.
    """
    channels, outs = kernels.shape[1:]
    passes = passes_for(maps, kernels)
    if passes is None or channels * outs > MOST_KERNELS:
        return None
    threads = torch.get_num_threads()
    lines = kernels.view(POINTS, channels, outs // LINE, LINE).permute(2, 0, 1, 3).contiguous()
    scratch = maps.new_empty(threads, POINTS, BLOCK, channels + LINE)
    out = maps.new_empty(*maps.shape[:3], outs)
    maps = maps.contiguous()
    pointers = (each.data_ptr() for each in (maps, lines, out, scratch))
    passes.convolve(*pointers, *maps.shape, outs, threads)
    return out


def weight_sums(maps: Tensor, gradients: Tensor) -> Tensor | None:
    """Return the products (36, O, C) of `gradients` and `maps` at the points, summed over tiles.

    Shapes: `maps` (n, H, W, C), `gradients` (n, H, W, O). Return None if there is no compiled pass.
    """
    channels, outs = maps.shape[3], gradients.shape[3]
    passes = passes_for(maps, gradients)
    if passes is None or channels * outs > MOST_SUMS:
        return None
    maps, gradients = maps.contiguous(), gradients.contiguous()
    threads = torch.get_num_threads()
    scratch = maps.new_empty(threads, POINTS, BLOCK, channels + outs)
    sums = maps.new_zeros(threads, POINTS, outs, channels)
    pointers = (each.data_ptr() for each in (maps, gradients, sums, scratch))
    passes.weight_sums(*pointers, *maps.shape, outs, threads)
    return sums.sum(0)
