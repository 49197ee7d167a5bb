"""Small convolutional network that trains in minutes on a laptop CPU.

conf/backbone/small.yaml

Convolutions on large feature maps take the most time. Therefore the early layers have strides: a 32-pixel image is
reduced to 8 x 8 maps before the number of channels increases. The network needs a few percent of resnet18's arithmetic
operations.
"""

from __future__ import annotations

from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.backbones.norm import norm_layer
from sslcli.errors import check_positive

SMALLEST_IMAGE = 16


class Small(Backbone):
    """Five 3x3 convolutions with normalization and ReLU, then global average pooling; num_features = 8 * width.

    Args:
        image_size: side of the training images in pixels, at least 16. The last feature maps have an eighth of this
            side.
        width: channels of block 1; the five blocks have 1, 2, 2, 4 and 8 times `width` channels.
        in_channels: image channels.
        norm: normalization layers: batch, layer or none, see `norm_layer`.

    Raises ValueError for arguments out of range.
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
        """Return the output of block 5, averaged over height and width: (N, in_channels, H, W) -> (N, 8 * width)."""
        return self.stages(images)["block5"].mean((2, 3))

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps after `block1` to `block5`, as name -> (N, channels, height, width).

        Their sides are 1/2, 1/4, 1/4, 1/8 and 1/8 of the image side.
        """
        x = images
        maps = {}
        for name in ("block1", "block2", "block3", "block4", "block5"):
            x = maps[name] = getattr(self, name)(x)
        return maps


def block(in_channels: int, out_channels: int, *, stride: int, norm: str) -> nn.Sequential:
    """Build a block of 3x3 convolution, normalization and ReLU.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride). The quotients are rounded up.
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm_layer(norm, out_channels), nn.ReLU(inplace=True))
