"""Names of feature layers and features at a layer."""

from __future__ import annotations

import pytest
import torch

from sslcli.backbones.small import Small
from sslcli.evaluation.layers import check, maps, names, read
from sslcli.methods.simclr import SimCLR
from tiny import TinyNet

IMAGES = torch.zeros(2, 3, 16, 16)


def test_layers_are_the_backbone_the_projection_and_the_stages() -> None:
    net = SimCLR(Small(image_size=16, width=4), dim=5).eval()
    assert names(net, IMAGES) == ["backbone", "projection", "block1", "block2", "block3", "block4", "block5"]
    images = torch.randn(2, 3, 16, 16)
    widths = [read(net, layer, images).shape[1] for layer in names(net, images)]
    assert widths == [32, 5, 4, 8, 8, 16, 32]
    torch.testing.assert_close(read(net, "block5", images), read(net, "backbone", images))
    with pytest.raises(ValueError, match="block3") as refused:
        check(net, "blok3", images)
    assert "It has: backbone, projection, block1" in str(refused.value)


def test_a_net_without_stages_has_its_output() -> None:
    assert names(TinyNet(), IMAGES) == ["backbone"]


def test_tokens_are_the_positions_of_a_stage_without_the_mean_over_them() -> None:
    net = SimCLR(Small(image_size=16, width=4), dim=5).eval()
    images = torch.randn(2, 3, 16, 16)
    check(net, "block4-tokens", images)
    tokens = read(net, "block4-tokens", images).view(2, 4, 16)
    assert torch.equal(tokens[:, 1], net.backbone.stages(images)["block4"][:, :, 0, 1])
    with pytest.raises(ValueError, match="feature_layer is 'projection-tokens'"):
        check(net, "projection-tokens", images)
    assert maps(TinyNet(), IMAGES) == {}
