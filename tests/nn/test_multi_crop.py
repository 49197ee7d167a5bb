"""Views of several sizes in one call of the backbone per size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sslcli.nn.multi_crop import forward_by_size
from tiny import TinyNet, vit


def crops(*sizes: int, num_images: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_images, 3, size, size, generator=generator) for size in sizes]


class Counted(nn.Module):
    """A backbone that records the shapes of its inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.shapes = net, []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return self.net(images)


@pytest.mark.parametrize("net", [TinyNet(norm=False), vit()], ids=["conv", "vit"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_without_batch_norm_features_and_gradients_are_those_of_a_call_per_view(
    net: nn.Module, channels_last: bool
) -> None:
    views = crops(8, 8, 4, 4, 4)
    if channels_last:
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    grouped, counted = forward_by_size(net, views), Counted(net)
    single = torch.cat([net(view) for view in views])
    torch.testing.assert_close(grouped, single, rtol=0, atol=1e-6)
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
    one, other = (torch.autograd.grad(found.square().sum(), weights) for found in (grouped, single))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    forward_by_size(counted, views)
    assert counted.shapes == [(6, 3, 8, 8), (9, 3, 4, 4)]


def test_batch_norm_statistics_are_those_of_the_views_of_one_size() -> None:
    net = TinyNet()
    views = crops(8, 8, 4)
    grouped = forward_by_size(net, views)
    torch.testing.assert_close(grouped, torch.cat([net(torch.cat(views[:2])), net(views[2])]))
    assert not torch.allclose(grouped, torch.cat([net(view) for view in views]), atol=1e-3)


def test_the_order_of_the_views_is_kept() -> None:
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    views = [torch.full((2, 1, size, size), float(value)) for value, size in enumerate((8, 4, 8, 8))]
    assert forward_by_size(mean, views).view(4, 2).tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
