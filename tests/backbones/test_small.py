from __future__ import annotations

import pytest
import torch

from sslcli.backbones.small import Small


@pytest.mark.parametrize("image_size", [32, 64, 96, 224])
def test_shapes_at_every_image_size(image_size: int) -> None:
    net = Small(image_size=image_size)
    images = torch.randn(2, 3, image_size, image_size)
    half, quarter, eighth = image_size // 2, image_size // 4, image_size // 8
    assert net.num_features == 256
    assert net(images).shape == (2, 256)
    assert {name: tuple(value.shape[1:]) for name, value in net.stages(images).items()} == {
        "block1": (32, half, half),
        "block2": (64, quarter, quarter),
        "block3": (64, quarter, quarter),
        "block4": (128, eighth, eighth),
        "block5": (256, eighth, eighth),
    }


def test_width_and_channels_are_free() -> None:
    net = Small(image_size=32, width=8, in_channels=2)
    assert net.num_features == 64
    assert net(torch.randn(2, 2, 32, 32)).shape == (2, 64)


def test_gradients_reach_every_parameter() -> None:
    net = Small(image_size=32)
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_pass_costs_a_few_per_cent_of_resnet18() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        Small(image_size=32)(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() < 0.05 * 2 * 556e6


def test_a_few_steps_learn_to_tell_two_textures_apart() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    stripes = torch.arange(32).remainder(4).lt(2).float().expand(3, 32, 32)
    images = torch.where(labels.view(-1, 1, 1, 1) == 1, stripes, stripes.mT) + 0.3 * torch.randn(64, 3, 32, 32)
    net = torch.nn.Sequential(Small(image_size=32, width=8), torch.nn.Linear(64, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_channels_last_changes_nothing_but_the_layout() -> None:
    net = Small(image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images)
        fast = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(images), expected, atol=1e-5, rtol=1e-5)
        maps = fast.stages(images)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in maps.values())


def test_too_small_images_and_wrong_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size is 8, .*at least 16 pixels.*resnet18"):
        Small(image_size=8)
    with pytest.raises(ValueError, match="width is 0"):
        Small(image_size=32, width=0)
