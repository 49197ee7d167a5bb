"""The classifier on top of a net, its levels and their learning rates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sslcli.backbones.resnet import ResNet
from sslcli.backbones.small import Small
from sslcli.backbones.vit import VisionTransformer
from sslcli.backbones.wrap import Wrapped
from sslcli.evaluation.layers import read
from sslcli.evaluation.network import Classifier, levels, parameter_groups, set_mode
from sslcli.methods.base import Method
from sslcli.methods.moco import MoCo
from sslcli.methods.simclr import SimCLR
from sslcli.nn.batch_norm import SplitBatchNorm
from tiny import TinyNet

IMAGES = torch.zeros(2, 3, 16, 16)
VIT = {"image_size": 16, "patch_size": 8, "width": 8, "depth": 2, "num_heads": 2}
NETS = {
    "small": (lambda: Small(image_size=16, width=4), [["block1"], ["block2"], ["block3"], ["block4"], ["block5"]]),
    "resnet": (
        lambda: ResNet("resnet18", image_size=16),
        [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]],
    ),
    "vit": (
        lambda: VisionTransformer(**VIT),
        [["cls_token", "patch_embed"], ["blocks.0"], ["blocks.1", "norm"]],
    ),
    "wrapped": (
        lambda: Wrapped(Small(image_size=16, width=4), num_features=32),
        [[f"module.block{n}"] for n in range(1, 6)],
    ),
}


def classifier_of(net: nn.Module, layer: str = "backbone") -> Classifier:
    width = read(net.eval(), layer, IMAGES).shape[1]
    return Classifier(net, layer, width=width, num_classes=3, images=IMAGES)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("inside", [False, True], ids=["bare", "in a method"])
def test_levels_go_from_input_to_output_and_hold_each_trained_parameter_once(name: str, inside: bool) -> None:
    make, wanted = NETS[name]
    net = SimCLR(make(), dim=4) if inside else make()
    classifier = classifier_of(net)
    found = levels(classifier.net)
    prefix = "backbone." if inside else ""
    assert len(found) == len(wanted)
    for level, starts in zip(found, wanted, strict=True):
        for parameter in level:
            assert parameter.startswith(tuple(f"{prefix}{start}" for start in starts)), parameter
    trained = {n for n, p in classifier.net.named_parameters() if p.requires_grad}
    listed = [parameter for level in found for parameter in level]
    assert len(listed) == len(set(listed))
    assert set(listed) == trained


def test_the_rate_falls_by_the_decay_a_level_below_the_classifier() -> None:
    classifier = classifier_of(VisionTransformer(**VIT))
    groups = parameter_groups(classifier, layer_decay=0.5, weight_decay=0.1)
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = dict(classifier.named_parameters())
    assert scale[id(named["classify.weight"])] == (1.0, 0.1)
    assert scale[id(named["classify.bias"])] == (1.0, 0.0)
    assert scale[id(named["net.blocks.1.attn.qkv.weight"])] == (0.5, 0.1)
    assert scale[id(named["net.norm.weight"])] == (0.5, 0.0)
    assert scale[id(named["net.blocks.0.attn.qkv.weight"])] == (0.25, 0.1)
    assert scale[id(named["net.patch_embed.proj.weight"])] == (0.125, 0.1)
    assert scale[id(named["net.cls_token"])] == (0.125, 0.0)
    assert len(scale) == len([p for p in named.values() if p.requires_grad])


def test_only_what_the_features_depend_on_is_trained_and_all_of_that() -> None:
    vit = VisionTransformer(**VIT, frozen_patch_projection=True)
    method = MoCo(vit, dim=4, queue_size=8)
    named = dict(classifier_of(method).net.named_parameters())
    assert named["backbone.patch_embed.proj.weight"].requires_grad
    assert not any(p.requires_grad for n, p in named.items() if not n.startswith("backbone."))


def test_layers_of_a_projection_are_a_level_of_their_own() -> None:
    classifier = classifier_of(SimCLR(TinyNet(), dim=4), layer="projection")
    assert classifier.classify.in_features == 4
    assert all(name.startswith("head.") for name in levels(classifier.net)[-1])


def test_a_net_of_split_batchnorm_is_trained_on_the_statistics_of_its_batch() -> None:
    classifier = classifier_of(MoCo(TinyNet(), dim=4, queue_size=8, bn_group=2))
    assert not [part for part in classifier.modules() if isinstance(part, SplitBatchNorm)]


def test_features_without_gradient_are_refused() -> None:
    class Detached(Method):
        def features(self, images: Tensor) -> Tensor:
            return self.backbone(images).detach()

    with pytest.raises(ValueError, match="no gradient"):
        classifier_of(Detached(TinyNet()))


def test_the_classifier_starts_at_zero_and_leaves_buffers_as_they_are() -> None:
    net = TinyNet()
    before = copy.deepcopy(net.state_dict())
    classifier = classifier_of(net)
    assert not classifier(torch.randn(2, 3, 8, 8)).any()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_batchnorm_may_keep_its_statistics() -> None:
    classifier = classifier_of(TinyNet())
    set_mode(classifier, batch_norm="eval")
    assert (classifier.training, classifier.net.norm.training) == (True, False)
    set_mode(classifier, batch_norm="train")
    assert classifier.net.norm.training
