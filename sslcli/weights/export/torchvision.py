"""format=torchvision: a state dict of torchvision's ResNets without classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sslcli.backbones.resnet import ResNet
from sslcli.weights.export.target import Target, Trained


class Torchvision(Target):
    """State dict with the names of torchvision.models, written with torch.save.

    The classifier `fc` is omitted, because self-supervised pre-training has none. With `fc` replaced by nn.Identity(),
    the state dict loads with strict=True.
    """

    name = "torchvision"
    weights_file = "model.pth"

    def obstacle(self, trained: Trained) -> str | None:
        net = trained.net
        if not isinstance(net, ResNet):
            return "the format has only the ResNets of sslcli"
        if trained.preprocessing.channels != 3:
            return f"the images have {trained.preprocessing.channels} channels, and the format has only RGB"
        return no_imagenet_resnet(net)

    def write(self, trained: Trained, folder: Path) -> None:
        with (folder / self.weights_file).open("wb") as file:  # torch.save(path) would hide the error number
            torch.save(trained.state, file)

    def load(self, trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
        from torchvision import models

        assert isinstance(trained.net, ResNet)
        net: nn.Module = getattr(models, trained.net.arch)(weights=None)
        net.fc = nn.Identity()
        net.load_state_dict(torch.load(folder / self.weights_file, weights_only=True))
        return net.eval()

    def usage(self, trained: Trained) -> str:
        return f"""\
import torch, torchvision

net = torchvision.models.{trained.net.arch}(weights=None)
net.fc = torch.nn.Identity()  # the file has no classifier
net.load_state_dict(torch.load("{self.weights_file}", weights_only=True))
features = net.eval()(images)
"""


def no_imagenet_resnet(net: ResNet) -> str | None:
    """Return in what a ResNet differs from the ResNets for ImageNet of other tools, or None if it does not differ."""
    if isinstance(net.maxpool, nn.Identity):
        return (
            "the backbone has the stem for small images (a 3x3 convolution without max-pool), and the format has only "
            "the stem for ImageNet (train with backbone.stem=imagenet)"
        )
    if not isinstance(net.bn1, nn.BatchNorm2d):
        return "the backbone has no BatchNorm (backbone.norm), and the ResNets of the format have BatchNorm"
    return None
