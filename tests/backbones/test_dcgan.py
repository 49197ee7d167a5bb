from __future__ import annotations

import pytest
import torch
from torch import nn

from sslcli.backbones.dcgan import DCGANNet
from sslcli.methods.dcgan import pooled_maps


@pytest.mark.parametrize(("image_size", "sides"), [(16, [8, 4, 2]), (32, [16, 8, 4, 2]), (64, [32, 16, 8, 4])])
def test_each_map_has_half_the_side_of_the_one_before(image_size: int, sides: list[int]) -> None:
    net = DCGANNet(image_size=image_size, width=4)
    images = torch.randn(2, 3, image_size, image_size)
    maps = net.stages(images)
    channels = [4, 8, 16, 32][: len(sides)]
    expected = [(width, side, side) for width, side in zip(channels, sides, strict=True)]
    assert [tuple(m.shape[1:]) for m in maps.values()] == expected
    assert list(maps) == [f"block{number}" for number in range(1, len(sides) + 1)]
    assert net.num_features == channels[-1] * sides[-1] ** 2
    net.eval()
    assert torch.equal(net(images), net.stages(images)[f"block{len(sides)}"].flatten(1))


def test_the_network_for_imagenet_has_the_maps_and_features_of_the_paper() -> None:
    with torch.device("meta"):
        net = DCGANNet(image_size=32, width=128, kernel=3)
        maps = net.stages(torch.zeros(1, 3, 32, 32))
    assert [m.shape[1] for m in maps.values()] == [128, 128, 256, 256, 512, 512]
    assert [m.shape[2] for m in maps.values()] == [32, 16, 16, 8, 8, 4]
    assert [block[0].kernel_size for block in net.blocks] == [(3, 3)] * 6
    assert net.num_features == 512 * 4 * 4
    assert pooled_maps({name: torch.zeros(m.shape) for name, m in maps.items()}, 4).shape == (1, 28672)


@pytest.mark.parametrize("image_size", [16, 33, 63, 64])
def test_the_number_of_features_is_that_of_the_last_map_of_3x3_convolutions(image_size: int) -> None:
    net = DCGANNet(image_size=image_size, width=2, kernel=3)
    images = torch.randn(2, 3, image_size, image_size)
    *_, last = net.stages(images).values()
    assert 4 <= last.shape[2] <= 8
    assert net(images).shape == (2, net.num_features)
    assert torch.equal(net.eval()(images), net.stages(images)[f"block{len(net.blocks)}"].flatten(1))


def test_large_images_end_in_maps_of_four_to_seven_pixels_and_few_channels_more() -> None:
    with torch.device("meta"):
        net = DCGANNet(image_size=224, width=4)
        *_, last = net.stages(torch.zeros(1, 3, 224, 224)).values()
    assert last.shape == (1, 32, 7, 7)


def test_images_of_another_size_give_as_many_features() -> None:
    net = DCGANNet(image_size=32, width=2)
    assert net(torch.randn(2, 3, 48, 48)).shape == (2, net.num_features)


def test_the_first_block_has_no_norm_and_the_others_have() -> None:
    blocks = DCGANNet(image_size=32, width=2).blocks
    assert [isinstance(block[1], nn.BatchNorm2d) for block in blocks] == [False, True, True, True]
    assert [block[0].bias is not None for block in blocks] == [True, False, False, False]
    layered = DCGANNet(image_size=32, width=2, norm="layer").blocks
    assert [isinstance(block[1], nn.GroupNorm) for block in layered] == [False, True, True, True]


def test_gradients_reach_every_parameter() -> None:
    net = DCGANNet(image_size=32, width=2)
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_too_small_images_and_wrong_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size is 8, .*at least 16 pixels"):
        DCGANNet(image_size=8)
    with pytest.raises(ValueError, match="width is 0"):
        DCGANNet(image_size=32, width=0)
    with pytest.raises(ValueError, match=r"kernel is 5.*3, 4"):
        DCGANNet(image_size=32, kernel=5)
    with pytest.raises(ValueError, match="norm is 'group'"):
        DCGANNet(image_size=32, norm="group")
