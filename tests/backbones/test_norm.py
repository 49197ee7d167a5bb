from __future__ import annotations

import pytest
import torch
from torch import nn

from sslcli.backbones.base import Backbone
from sslcli.backbones.norm import norm_layer
from sslcli.backbones.resnet import ResNet
from sslcli.backbones.small import Small
from sslcli.methods.base import num_features

NETS = {
    "small": lambda norm: Small(image_size=32, norm=norm),
    "resnet18": lambda norm: ResNet("resnet18", image_size=32, norm=norm),
    "resnet50": lambda norm: ResNet("resnet50", image_size=224, norm=norm),
}


def kinds(net: nn.Module) -> set[type]:
    return {type(part) for part in net.modules() if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm))}


@pytest.mark.parametrize("word", NETS)
def test_each_norm_is_what_it_says_and_the_only_one(word: str) -> None:
    expected: dict[str, set[type]] = {"batch": {nn.BatchNorm2d}, "layer": {nn.GroupNorm}, "none": set()}
    assert {norm: kinds(NETS[word](norm)) for norm in expected} == expected
    groups = [part.num_groups for part in NETS[word]("layer").modules() if isinstance(part, nn.GroupNorm)]
    assert set(groups) == {1}


@pytest.mark.parametrize("word", NETS)
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_without_batchnorm_no_image_tells_of_another(word: str, norm: str) -> None:
    net: Backbone = NETS[word](norm).train()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    net(images)[0].square().sum().backward()
    assert images.grad is not None
    assert images.grad[0].any()
    assert not images.grad[1:].any()
    assert not dict(net.named_buffers())


@pytest.mark.parametrize("word", NETS)
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("side", [8, 16])
def test_patches_of_a_few_pixels_have_features_of_a_sound_size_and_gradients(word: str, norm: str, side: int) -> None:
    torch.manual_seed(0)
    net: Backbone = NETS[word](norm)
    features = net(torch.randn(4, 3, side, side))
    assert features.shape == (4, num_features(net))
    assert 0.01 < float(features.detach().square().mean().sqrt()) < 100
    features.square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_small_without_norm_has_biases_instead() -> None:
    names = [name for name, _ in Small(image_size=32, norm="none").named_parameters()]
    assert names == [f"block{n}.0.{part}" for n in range(1, 6) for part in ("weight", "bias")]


def test_resnet_without_norm_starts_its_branches_small() -> None:
    def size(norm: str, name: str) -> float:
        torch.manual_seed(0)
        weight = ResNet("resnet18", image_size=32, norm=norm).get_parameter(f"layer2.0.{name}.weight")
        return float(weight.detach().std())

    assert size("none", "conv1") == pytest.approx(size("layer", "conv1"))
    assert size("none", "conv2") == pytest.approx(size("layer", "conv2") / 8**0.5)


def test_wrong_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="norm is 'group', but it must be one of: batch, layer, none"):
        norm_layer("group", 4)
    with pytest.raises(ValueError, match="norm is 'group'"):
        Small(image_size=32, norm="group")
    with pytest.raises(ValueError, match="norm is 'group'"):
        ResNet("resnet18", image_size=32, norm="group")
    with pytest.raises(ValueError, match=r"zero_init_residual .*norm=layer"):
        ResNet("resnet18", image_size=32, norm="none", zero_init_residual=True)
