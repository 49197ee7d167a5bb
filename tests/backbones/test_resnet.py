from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from sslcli.backbones.resnet import ARCHS, ResNet


@pytest.mark.parametrize("arch", ARCHS)
def test_width_and_keys_are_torchvisions_without_the_classifier(arch: str) -> None:
    with torch.device("meta"):
        ours = ResNet(arch, image_size=224)
        theirs = getattr(torchvision.models, arch)()
    expected = {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    assert ours.num_features == theirs.fc.in_features == (512 if arch in ("resnet18", "resnet34") else 2048)
    assert ours(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, ours.num_features)


def test_weights_move_to_torchvision_and_give_the_same_features() -> None:
    ours = ResNet("resnet18", image_size=224).eval()
    theirs = torchvision.models.resnet18().eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert missing.unexpected_keys == []
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(("image_size", "side"), [(32, 32), (64, 64), (96, 24), (224, 56)])
def test_the_stem_follows_the_image_size(image_size: int, side: int) -> None:
    with torch.device("meta"):
        maps = ResNet("resnet18", image_size=image_size).stages(torch.zeros(1, 3, image_size, image_size))
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == {
        f"layer{i + 1}": (64 * 2**i, side // 2**i, side // 2**i) for i in range(4)
    }


@pytest.mark.parametrize("image_size", [32, 224])
def test_the_stem_can_be_chosen_against_the_image_size(image_size: int) -> None:
    with torch.device("meta"):
        cifar = ResNet("resnet18", image_size=image_size, stem="cifar")
        imagenet = ResNet("resnet18", image_size=image_size, stem="imagenet")
    assert (cifar.conv1.kernel_size, cifar.conv1.stride, cifar.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(cifar.maxpool, nn.Identity)
    assert (imagenet.conv1.kernel_size, imagenet.conv1.stride, imagenet.conv1.padding) == ((7, 7), (2, 2), (3, 3))
    assert isinstance(imagenet.maxpool, nn.MaxPool2d)
    assert set(cifar.state_dict()) == set(imagenet.state_dict())


def test_the_stem_of_solo_learn_has_the_weights_of_the_cifar_stem_and_larger_maps() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        solo = ResNet("resnet18", image_size=32, stem="cifar_padding2").eval()
    usual = ResNet("resnet18", image_size=32, stem="cifar").eval()
    usual.load_state_dict(solo.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert [m.shape[-1] for m in solo.stages(images).values()] == [34, 17, 9, 5]
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    torch.testing.assert_close(solo(images), usual(padded))


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_other_channel_counts_change_the_first_convolution_alone(stem: str) -> None:
    with torch.device("meta"):
        three, two = (ResNet("resnet18", image_size=32, stem=stem, in_channels=n) for n in (3, 2))
    changed = [name for name, value in two.state_dict().items() if value.shape != three.state_dict()[name].shape]
    assert changed == ["conv1.weight"]
    assert two.conv1.weight.shape[1] == 2


def test_a_new_first_convolution_is_drawn_like_the_others() -> None:
    weight = ResNet("resnet18", image_size=32).conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_zero_init_residual_starts_every_block_at_its_shortcut() -> None:
    def last_norms(net: ResNet) -> list[float]:
        return [value.abs().max().item() for name, value in net.state_dict().items() if name.endswith("bn2.weight")]

    assert set(last_norms(ResNet("resnet18", image_size=32, zero_init_residual=True))) == {0.0}
    assert set(last_norms(ResNet("resnet18", image_size=32))) == {1.0}


@pytest.mark.parametrize("stem", ["cifar", "cifar_padding2", "imagenet"])
def test_gradients_reach_every_parameter(stem: str) -> None:
    net = ResNet("resnet18", image_size=32, stem=stem)
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_features_are_the_mean_of_the_last_stage() -> None:
    net = ResNet("resnet18", image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(images), net.stages(images)["layer4"].mean((2, 3)))


def test_channels_last_changes_nothing_but_the_layout() -> None:
    net = ResNet("resnet18", image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images)
        fast = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(images), expected, atol=1e-5, rtol=1e-5)
        maps = fast.stages(images)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in maps.values())


def test_wrong_values_are_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'resnet19'.*one of: resnet18, resnet34.*Did you mean 'resnet1"):
        ResNet("resnet19", image_size=32)
    with pytest.raises(ValueError, match=r"stem is 'small', .* auto, imagenet, cifar, cifar_padding2"):
        ResNet("resnet18", image_size=32, stem="small")
    with pytest.raises(ValueError, match="image_size is 0"):
        ResNet("resnet18", image_size=0)
