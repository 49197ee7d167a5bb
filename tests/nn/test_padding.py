"""Convolution weights that multiply only padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sslcli.backbones.small import Small
from sslcli.nn.padding import recorded_weights, used_positions


def unused_by_gradient(net: nn.Module, *sides: int) -> float:
    """The fraction of weights of convolutions whose gradient is zero for every input."""
    net.double()
    for side in sides:
        for _ in range(3):
            net(torch.randn(4, 3, side, side, dtype=torch.float64)).sin().sum().backward()
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)]
    zero = sum(int((weight.grad == 0).sum()) for weight in weights if weight.grad is not None)
    return zero / sum(weight.numel() for weight in weights)


def recorded(net: nn.Module, *sides: int) -> float:
    dtype = next(net.parameters()).dtype
    with recorded_weights(net) as found:
        for side in sides:
            net(torch.zeros(1, 3, side, side, dtype=dtype))
    return found.padding_fraction()


class Linearized(nn.Module):
    """The convolutions of the small backbone without ReLU, so that only padding makes gradients zero."""

    def __init__(self) -> None:
        super().__init__()
        small = Small(image_size=32, width=4)
        self.layers = nn.Sequential(*(block[0] for name, block in small.named_children()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).mean((2, 3))


@pytest.mark.parametrize("side", [2, 4, 6, 8, 16, 32])
def test_the_fraction_is_that_of_the_weights_without_gradient(side: int) -> None:
    net = Linearized()
    assert recorded(net, side) == pytest.approx(unused_by_gradient(net, side))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 2, 3, padding=1),
        nn.Conv2d(3, 2, 5, stride=2, padding=2),
        nn.Conv2d(3, 2, (1, 3), padding=(0, 1)),
        nn.Conv2d(3, 2, 3, padding=2, dilation=2),
        nn.Conv2d(3, 2, 4, padding="same"),
        nn.Conv2d(3, 2, 3, padding="same", dilation=2),
        nn.Conv2d(3, 2, 2, padding="valid"),
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(3, 3, 3, stride=2, padding=1, groups=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [2, 3, 5])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_kind_of_convolution_is_understood(conv: nn.Conv2d, side: int) -> None:
    net = nn.Sequential(conv)
    assert recorded(net, side) == pytest.approx(unused_by_gradient(net, side))


def test_a_weight_that_one_of_several_sizes_uses_is_used() -> None:
    net = Linearized()
    assert recorded(net, 8, 32) == recorded(net, 32) == 0
    assert recorded(net, 8) > 0.7


def test_a_layer_that_was_not_called_is_not_counted_and_hooks_are_removed() -> None:
    conv = nn.Conv2d(3, 2, 3, padding=1)
    with recorded_weights(nn.Sequential(conv)) as found:
        pass
    assert found.padding_fraction() == 0
    conv(torch.zeros(1, 3, 1, 1))
    assert found.used == {}


def test_both_axes_have_their_own_positions() -> None:
    conv = nn.Conv2d(3, 2, 3, padding=1)
    assert used_positions(conv, 0, 1).tolist() == [False, True, False]
    assert used_positions(conv, 1, 2).tolist() == [True, True, True]
    with recorded_weights(nn.Sequential(conv)) as found:
        conv(torch.zeros(1, 3, 1, 2))
    assert found.padding_fraction() == pytest.approx(2 / 3)
