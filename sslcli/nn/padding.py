"""Convolution weights that multiply only padding, because the feature maps are too small.

A 3x3 convolution with a padding of one pixel on a map of one pixel uses only the center of its kernel. The other eight
ninths of its weights multiply zeros, receive no gradient and keep their initial values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class UsedWeights:
    """For each convolution, the positions in its kernel whose weights multiplied pixels and not only zero padding.

    Attributes:
        used: for each `nn.Conv2d` that was called, its name and a bool tensor (kernel height, kernel width). An entry
            is True if the weights at this position of the kernel multiplied a pixel in at least one call.
        weights: the number of weights of each of these convolutions, by name.
    """

    def __init__(self) -> None:
        self.used: dict[str, Tensor] = {}
        self.weights: dict[str, int] = {}

    def add(self, name: str, conv: nn.Conv2d, height: int, width: int) -> None:
        """Add a call of `conv` with a map of height x width pixels."""
        found = used_positions(conv, 0, height)[:, None] & used_positions(conv, 1, width)
        self.used[name] = self.used.get(name, torch.zeros_like(found)) | found
        self.weights[name] = conv.weight.numel()

    def padding_fraction(self) -> float:
        """Return the fraction of the convolution weights that multiplied only padding, from 0 to 1."""
        unused = sum(self.weights[name] * (1 - used.float().mean().item()) for name, used in self.used.items())
        return unused / max(1, sum(self.weights.values()))


def used_positions(conv: nn.Conv2d, axis: int, size: int) -> Tensor:
    """Return which positions along one axis of the kernel multiply at least one pixel of a map: bool (kernel side,).

    Args:
        conv: the convolution. Only its zero padding contains no pixels; other padding modes repeat pixels.
        axis: 0 = vertical, 1 = horizontal.
        size: side of the input map along this axis, in pixels.
    """
    kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return torch.ones(kernel, dtype=torch.bool)
    span = dilation * (kernel - 1)
    before, after = (span // 2, span - span // 2) if conv.padding == "same" else 2 * (int(conv.padding[axis]),)
    outputs = (size + before + after - span - 1) // stride + 1
    first_pixel = torch.arange(outputs)[:, None] * stride - before
    pixel = first_pixel + torch.arange(kernel) * dilation  # (outputs, kernel side)
    return ((pixel >= 0) & (pixel < size)).any(0)


@contextmanager
def recorded_weights(net: nn.Module) -> Iterator[UsedWeights]:
    """Record which convolution weights of `net` are used in the forward passes of the `with` block.

    A weight is used if it multiplies at least one pixel. All other weights multiply only zero padding.
    """
    found = UsedWeights()

    def record(name: str, conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        found.add(name, conv, *inputs[0].shape[-2:])

    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_pre_hook(lambda conv, inputs, name=name: record(name, conv, inputs)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
