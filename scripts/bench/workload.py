"""Workloads, batch size, random views and backbone of the training benchmarks of all libraries."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

BATCH, SIZE = 128, 32
CPU = torch.device("cpu")
METHODS = ("simclr", "moco_v2", "byol")


class Workload(NamedTuple):
    """Backbone, image size in pixels and images per step."""

    backbone: str
    size: int
    batch: int


def random_views() -> list[Tensor]:
    """Return two views of random images in [0, 1], each (BATCH, 3, SIZE, SIZE)."""
    return [torch.rand(BATCH, 3, SIZE, SIZE) for _ in range(2)]


def cifar_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the CIFAR stem and without the classifier, 512 features."""
    net = torchvision.models.resnet18()
    net.conv1, net.maxpool, net.fc = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    return net
