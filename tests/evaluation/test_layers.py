"""Names of feature layers and features at a layer."""

from __future__ import annotations

import pytest
import torch

from sslcli.backbones.small import Small
from sslcli.evaluation.layers import check, names, read
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
