"""Benchmark of the 3x3 convolutions of ResNet-18 in float32: Winograd and torch, forward and backward, 128 images."""

from __future__ import annotations

from functools import partial

import torch
from measure import Result, run_benchmark, timed
from torch import nn

BATCH = 128
SIDES = {64: 32, 128: 16, 256: 8, 512: 4}  # side of the feature maps in pixels, by the channels of the stage


def convolution(channels: int, *, winograd: bool) -> Result:
    """Time the convolution of a stage in channels-last memory, as in training."""
    from sslcli.kernels.winograd import use_winograd
    from sslcli.system.memory import keep_freed_memory

    keep_freed_memory()
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    if winograd:
        use_winograd(conv)
    shape = (BATCH, channels, SIDES[channels], SIDES[channels])
    images, gradient = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2))
    images.requires_grad_()
    return timed(lambda: conv(images).backward(gradient), images=BATCH, seconds=5.0)


if __name__ == "__main__":
    benchmarks = {}
    for channels in SIDES:
        benchmarks[f"channels_{channels}/sslcli"] = partial(convolution, channels, winograd=True)
        benchmarks[f"channels_{channels}/torch"] = partial(convolution, channels, winograd=False)
    run_benchmark(benchmarks)
