"""A small convolutional network that a laptop's processor trains in minutes.

conf/backbone/small.yaml

Convolutions on large maps cost most: two early strides leave 8 x 8 maps of a 32-pixel image before the layers
get wide, at a few per cent of the arithmetic of resnet18.
"""

from __future__ import annotations

from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.backbones.norm import norm_layer
from sslcli.errors import check_positive

SMALLEST_IMAGE = 16


class Small(Backbone):
    """Five 3x3 convolutions, each with normalisation and ReLU, and the mean over positions; num_features = 8 * width.

    Args:
        image_size: side of the training images in pixels, at least 16; maps after block 5 have an eighth of it.
        width: channels of block 1; the blocks have 1, 2, 2, 4 and 8 times as many.
        in_channels: of the images.
        norm: batch, layer or none, see `norm_layer`.

    Raises ValueError for values outside these.
    """

    def __init__(self, *, image_size: int, width: int = 32, in_channels: int = 3, norm: str = "batch") -> None:
        super().__init__()
        check_positive(image_size=image_size, width=width, in_channels=in_channels)
        if image_size < SMALLEST_IMAGE:
            raise ValueError(
                f"image_size is {image_size}, but the small backbone needs at least {SMALLEST_IMAGE} pixels: "
                "enlarge the images, or take resnet18 with stem=cifar"
            )
        self.block1 = block(in_channels, width, stride=2, norm=norm)
        self.block2 = block(width, 2 * width, stride=2, norm=norm)
        self.block3 = block(2 * width, 2 * width, stride=1, norm=norm)
        self.block4 = block(2 * width, 4 * width, stride=2, norm=norm)
        self.block5 = block(4 * width, 8 * width, stride=1, norm=norm)
        self.num_features = 8 * width

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 8 * width), the mean over positions of block 5."""
        return self.stages(images)["block5"].mean((2, 3))

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Maps after `block1` to `block5`, of a half, a quarter, a quarter, an eighth and an eighth of the side."""
        x = images
        maps = {}
        for name in ("block1", "block2", "block3", "block4", "block5"):
            x = maps[name] = getattr(self, name)(x)
        return maps


def block(in_channels: int, out_channels: int, *, stride: int, norm: str) -> nn.Sequential:
    """3x3 convolution, normalisation, ReLU: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm_layer(norm, out_channels), nn.ReLU(inplace=True))
