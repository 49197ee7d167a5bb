"""Benchmark of attention on the CPU, forward and backward: sslcli, torch's fused attention, and two matrix products.

sslcli uses one of the other two variants, depending on dtype and number of tokens. With ONE_CORE=1, the CPU time of one
thread is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import Result, run_benchmark, timed
from torch import Tensor

from sslcli.nn.transformer import attend

SHAPES = [(64, 4, 17, 32), (64, 4, 65, 32), (64, 3, 65, 64), (16, 6, 197, 64), (8, 6, 257, 64)]  # N, H, T, K
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TASKS = {f"{name}_{'_'.join(map(str, shape))}": (shape, DTYPES[name]) for name in DTYPES for shape in SHAPES}
CLOCK = time.process_time if "ONE_CORE" in os.environ else time.perf_counter


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the softmax attention of queries (N, H, T, K) over keys and values (N, H, T, K)."""
    weights = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3)
    return weights @ v


def attention(function: Callable[..., Tensor], shape: tuple[int, int, int, int], dtype: torch.dtype) -> Result:
    """Time `function` of queries, keys and values of `shape`: images, heads, tokens, width of a head."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, dtype=dtype)

    def step() -> None:
        torch.autograd.grad(function(q, k, v), (q, k, v), gradient)

    return timed(step, images=shape[0], seconds=4.0, clock=CLOCK)


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "sslcli": attend,
    "fused": F.scaled_dot_product_attention,
    "two products": two_products,
}

if __name__ == "__main__":
    if "ONE_CORE" in os.environ:
        torch.set_num_threads(1)
    run_benchmark(
        {
            f"{task}/{name}": partial(attention, function, *options)
            for task, options in TASKS.items()
            for name, function in VARIANTS.items()
        }
    )
