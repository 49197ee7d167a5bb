"""Python interface of the compiled Winograd convolutions in `winograd_passes.c`, loaded by `sslcli.kernels.library`.

A pass is a C function that processes all tiles. `sslcli.kernels.winograd` first calls the functions of this module. If
there is no pass for the arguments, a function returns None or False, and `sslcli.kernels.winograd` uses torch
operations. There is no pass in these cases:

- The dtype is not float32.
- The number of channels is not a multiple of 16 (a cache line).
- The product of the numbers of input and output channels is too large. The maximum is MOST_KERNELS in `convolve`, and
  MOST_SUMS in `weight_sums`.
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
    """Return the library compiled from `winograd_passes.c`, or None if it is not available."""
    return compiled.load(PART, ARGUMENTS)


def passes_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the compiled library if it supports the dtype and channels of all `tensors`, else None.

    It supports float32, and numbers of channels that are multiples of 16. The channels must be the last dimension of
    each tensor.
    """
    if all(each.dtype == torch.float32 and each.shape[-1] % LINE == 0 for each in tensors):
        return library()
    return None


def transform(name: str, given: Tensor, out: Tensor, maps: Tensor) -> bool:
    """Apply the compiled transform `name` to `given`, and write the result to `out`.

    Return False, and write nothing, if there is no compiled C function (pass) for these arguments.

    `name` is a function of `sslcli.kernels.winograd_transforms`: to_points, from_points or gradient_points. `maps` (n,
    H, W, C) is the argument with this shape: `out` for from_points, and `given` for the other transforms.
    """
    passes = passes_for(maps)
    if passes is None:
        return False
    given = given.contiguous()
    assert out.is_contiguous()
    getattr(passes, name)(given.data_ptr(), out.data_ptr(), *maps.shape, torch.get_num_threads())
    return True


def convolve(maps: Tensor, kernels: Tensor) -> Tensor | None:
    """Return the convolution (n, H, W, O) of `maps` (n, H, W, C).

    If there is no compiled function for the arguments, the result is None.

    `kernels` (36, C, O) are the values of the 3x3 kernels at the 36 points of the Winograd algorithm. The algorithm
    divides the maps into tiles. Each thread processes a few tiles at a time.
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
    """Return the products from which the gradient of the weight is computed, (36, O, C).

    `maps` (n, H, W, C) are the inputs of the convolution for n images, and `gradients` (n, H, W, O) are the gradients
    of its outputs. Both are divided into tiles and evaluated at the 36 points of the Winograd algorithm. The result is
    the product of both at each point, summed over tiles. If there is no compiled function for the arguments, the
    result is None.
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
