from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exported import round_trip, run_usage, trained
from sslcli.backbones.resnet import ResNet
from sslcli.backbones.small import Small
from sslcli.weights.export.torchvision import Torchvision

TARGET = Torchvision()


def test_torchvision_computes_the_same_features(tmp_path: Path) -> None:
    net = trained(ResNet("resnet18", image_size=32, stem="imagenet"), size=32)
    assert round_trip(TARGET, net, tmp_path) == 0
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(run_usage(TARGET, net, tmp_path, images), net.net(images))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stem": "cifar"}, "stem for small images"),
        ({"stem": "imagenet", "norm": "layer"}, "no BatchNorm"),
        ({"stem": "imagenet", "in_channels": 4}, "4 channels"),
    ],
)
def test_a_resnet_that_torchvision_does_not_have_is_refused(options: dict[str, object], reason: str) -> None:
    net = ResNet("resnet18", image_size=32, **options)  # type: ignore[arg-type]
    found = TARGET.obstacle(trained(net, size=32, channels=net.conv1.in_channels))
    assert found is not None
    assert reason in found


def test_another_network_is_refused() -> None:
    assert "only the ResNets" in str(TARGET.obstacle(trained(Small(image_size=16, width=4), size=16)))
