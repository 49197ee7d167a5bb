"""A 3x3 convolution of ResNet-18 in float32, forward and backward of 128 images of 32 px: Winograd's and torch's."""

from __future__ import annotations

from functools import partial

import torch
from measure import Result, answer, timed
from torch import nn

BATCH = 128
SIDES = {64: 32, 128: 16, 256: 8, 512: 4}  # of the maps, for the channels of each stage


def convolution(channels: int, *, fast: bool) -> Result:
    """Images in channels-last memory, as in training."""
    from sslcli.kernels.winograd import use_winograd
    from sslcli.system.memory import keep_freed_memory

    keep_freed_memory()
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    if fast:
        use_winograd(conv)
    shape = (BATCH, channels, SIDES[channels], SIDES[channels])
    images, direction = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2))
    images.requires_grad_()
    return timed(lambda: conv(images).backward(direction), images=BATCH, seconds=5.0)


if __name__ == "__main__":
    work = {}
    for channels in SIDES:
        work[f"channels_{channels}/sslcli"] = partial(convolution, channels, fast=True)
        work[f"channels_{channels}/torch"] = partial(convolution, channels, fast=False)
    answer(work)
