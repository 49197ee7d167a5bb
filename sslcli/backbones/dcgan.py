"""DCGAN discriminator without its last layer. Its convolutions have stride 2, and the last feature map is flattened.

Radford et al. 2016  https://arxiv.org/abs/1511.06434  https://github.com/Newmu/dcgan_code  conf/backbone/dcgan.yaml
Kernels are 4x4. In the official code, they are 5x5.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.backbones.norm import norm_layer
from sslcli.errors import check_positive

SLOPE = 0.2  # negative slope of LeakyReLU (section 4)
INIT_STD = 0.02  # initial standard deviation of weights, and of BatchNorm's scales around 1 (section 4, official code)
SMALLEST_IMAGE = 16
DEEPEST = 8  # maximum of (number of channels) / `width`


class DCGANNet(Backbone):
    """4x4 convolutions of stride 2 with LeakyReLU. All convolutions except the first are followed by normalization.

    The number of convolutions depends on `image_size`. With 64 pixels or more, the last feature map has a side of 4 to
    7 pixels. With fewer pixels, it has a side of 2 or 3 pixels. `num_features` is the number of channels of the last
    feature map times its number of positions.

    Args:
        image_size: side of the training images in pixels, at least 16.
        width: channels of the first feature map. Each further convolution doubles the channels, up to 8 * width.
        in_channels: image channels.
        norm: normalization layers: batch, layer or none, see `norm_layer`.

    Raises ValueError for arguments out of range.
    """

    def __init__(self, *, image_size: int, width: int = 64, in_channels: int = 3, norm: str = "batch") -> None:
        super().__init__()
        check_positive(image_size=image_size, width=width, in_channels=in_channels)
        if image_size < SMALLEST_IMAGE:
            raise ValueError(
                f"image_size is {image_size}, but the dcgan backbone needs at least {SMALLEST_IMAGE} pixels: "
                "enlarge the images"
            )
        octaves = image_size.bit_length() - 3  # halvings to a side of 4 to 7 pixels: 16 -> 2, 32 -> 3, 64 -> 4
        depth = max(octaves, min(octaves + 1, 4))
        self.side = image_size >> depth
        widths = [in_channels, *(width * min(2**number, DEEPEST) for number in range(depth))]
        self.blocks = nn.Sequential(
            *(
                block(before, after, norm="none" if number == 0 else norm)
                for number, (before, after) in enumerate(pairwise(widths))
            )
        )
        self.num_features = widths[-1] * self.side**2

    def forward(self, images: Tensor) -> Tensor:
        """Return the flattened last feature map: (N, in_channels, H, W) -> (N, num_features).

        If the images do not have the training size, the last feature map is first average-pooled to the size that it
        has for images of the training size.
        """
        *_, last = self.stages(images).values()
        if last.shape[2:] != (self.side, self.side):
            last = F.adaptive_avg_pool2d(last, self.side)
        return last.flatten(1)

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps after `block1`, `block2`, ..., as name -> (N, channels, height, width).

        Each feature map has half the side of the previous one, rounded down.
        """
        x = images
        maps = {}
        for number, layer in enumerate(self.blocks, start=1):
            x = maps[f"block{number}"] = layer(x)
        return maps


def block(in_channels: int, out_channels: int, *, norm: str) -> nn.Sequential:
    """Build a block of 4x4 convolution, normalization and LeakyReLU.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H / 2, W / 2).
    """
    conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=norm == "none")
    normalize = norm_layer(norm, out_channels)
    nn.init.normal_(conv.weight, std=INIT_STD)
    if isinstance(normalize, nn.BatchNorm2d):
        nn.init.normal_(normalize.weight, 1.0, INIT_STD)
    return nn.Sequential(conv, normalize, nn.LeakyReLU(SLOPE, inplace=True))
