"""Residual networks of torchvision without the classifier, with an optional stem for small images.

He et al. 2016  https://arxiv.org/abs/1512.03385     wide: Zagoruyko & Komodakis 2016  https://arxiv.org/abs/1605.07146
conf/backbone/resnet*.yaml, conf/backbone/wide_resnet*.yaml
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.backbones.norm import norm_layer
from sslcli.errors import check_positive, nearest

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "wide_resnet101_2")
STEMS = ("auto", "imagenet", "cifar", "cifar_padding2")
LARGEST_CIFAR_IMAGE = 64


class ResNet(Backbone):
    """torchvision ResNet without `fc`.

    The parameters have the same names as in torchvision, so sslcli and torchvision can exchange weights.

    Args:
        arch: one of `ARCHS`; num_features is 512 for resnet18 and resnet34, and 2048 for the others.
        image_size: side of the training images in pixels. It determines the stem if `stem` is "auto".
        stem: one of
            "imagenet": 7x7 convolution of stride 2, and max-pool.
            "cifar": 3x3 convolution of stride 1, without max-pool (SimCLR appendix B.9).
            "cifar_padding2": "cifar" with a padding of 2 pixels instead of 1, as in solo-learn (solo/methods/base.py).
                For images of 32 pixels, the feature maps of the four stages then have sides of 34, 17, 9 and 5 pixels,
                instead of 32, 16, 8 and 4.
            "auto": "cifar" for images of up to 64 pixels, "imagenet" for larger images.
        in_channels: image channels. A value other than 3 changes only the first convolution.
        zero_init_residual: initialize the output of every residual branch to zero (Goyal et al. 2017, section 5.1).
            It cannot be combined with norm="none".
        norm: batch, layer or none, see `norm_layer`. With none, the initial outputs of the L residual branches are
            scaled by 1 / sqrt(L). The scaling keeps the sum of the branches bounded for any L (after Zhang et al. 2019,
            arXiv:1901.09321).

    Raises ValueError for an unknown arch, stem or norm, and for `zero_init_residual` with norm="none".
    """

    conv1: nn.Conv2d
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module

    def __init__(
        self,
        arch: str,
        *,
        image_size: int,
        stem: str = "auto",
        in_channels: int = 3,
        zero_init_residual: bool = False,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if arch not in ARCHS:
            raise ValueError(f"arch is {arch!r}, but it must be one of: {', '.join(ARCHS)}.{nearest(arch, ARCHS)}")
        if stem not in STEMS:
            raise ValueError(f"stem is {stem!r}, but it must be one of: {', '.join(STEMS)}")
        check_positive(image_size=image_size, in_channels=in_channels)
        if norm == "none" and zero_init_residual:
            raise ValueError(
                "zero_init_residual sets the last norm of every branch to zero, but norm is none: take norm=layer, "
                "or zero_init_residual=false"
            )

        from torchvision import models

        # The classifier is discarded. num_classes=1 makes its initialization fast.
        net = getattr(models, arch)(
            weights=None,
            num_classes=1,
            zero_init_residual=zero_init_residual,
            norm_layer=partial(norm_layer, norm),
        )
        self.arch = arch
        self.num_features: int = net.fc.in_features
        for name, child in net.named_children():
            if name != "fc":
                self.add_module(name, child)
        if stem.startswith("cifar") or (stem == "auto" and image_size <= LARGEST_CIFAR_IMAGE):
            padding = 2 if stem == "cifar_padding2" else 1
            self.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=padding, bias=False)
            self.maxpool = nn.Identity()
        elif in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if norm == "none":
            shrink_branches(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the output of layer4, averaged over height and width: (N, in_channels, H, W) -> (N, num_features)."""
        return self.avgpool(self.stages(images)["layer4"]).flatten(1)  # type: ignore[no-any-return]

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps after `layer1` to `layer4`, as name -> (N, channels, height, width).

        Each feature map has half the side of the previous one, rounded up.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = maps[name] = getattr(self, name)(x)
        return maps


def shrink_branches(net: ResNet) -> None:
    """Divide the weights of the last convolution in each of the L residual branches by sqrt(L)."""
    blocks = [block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage.children()]
    for block in blocks:
        last = block.get_submodule("conv3" if hasattr(block, "conv3") else "conv2")
        assert isinstance(last, nn.Conv2d)
        last.weight.data /= len(blocks) ** 0.5
