"""DCGAN discriminator without its last layer. It has strided convolutions and flattens the last feature map.

Radford et al. 2016  https://arxiv.org/abs/1511.06434  https://github.com/Newmu/dcgan_code  conf/backbone/dcgan.yaml
In this implementation, kernels are 4x4 or 3x3. In the official code, they are 5x5 for faces, and 3x3 for ImageNet:
https://github.com/Newmu/dcgan_code/blob/ec3721a/imagenet/load_pretrained.py
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
KERNELS = (3, 4)
DEEPEST = 8  # maximum of (number of channels) / `width`


class DCGANNet(Backbone):
    """Convolutions with LeakyReLU. All convolutions except the first are followed by normalization.

    The number of convolutions depends on `image_size`.

    - With `kernel` 4, every convolution has stride 2. If `image_size` is at least 64, the last feature map has a side
      of 4 to 7 pixels. For smaller images, this side is 2 or 3 pixels.
    - With `kernel` 3, a convolution of stride 1 precedes each convolution of stride 2. The last feature map always has
      a side of 4 to 8 pixels.

    `num_features` is channels * height * width of the last feature map.

    Args:
        image_size: side of the training images in pixels, at least 16.
        width: channels of the first feature map. Each further convolution (`kernel` 4) or pair of convolutions
            (`kernel` 3) doubles the channels, up to 8 * width.
        kernel: 4, or 3 for the network of the official code for ImageNet. At 32 pixels and width 128, that network has
            128, 128, 256, 256, 512 and 512 channels.
        in_channels: image channels.
        norm: normalization layers: batch, layer or none, see `norm_layer`.

    Raises ValueError for arguments out of range.
    """

    def __init__(
        self, *, image_size: int, width: int = 64, kernel: int = 4, in_channels: int = 3, norm: str = "batch"
    ) -> None:
        super().__init__()
        check_positive(image_size=image_size, width=width, in_channels=in_channels)
        if image_size < SMALLEST_IMAGE:
            raise ValueError(
                f"image_size is {image_size}, but the dcgan backbone needs at least {SMALLEST_IMAGE} pixels: "
                "enlarge the images"
            )
        if kernel not in KERNELS:
            raise ValueError(f"kernel is {kernel}, but it must be one of {', '.join(map(str, KERNELS))}")
        octaves = image_size.bit_length() - 3  # halvings to a side of 4 to 7 pixels: 16 -> 2, 32 -> 3, 64 -> 4
        depth = octaves if kernel == 3 else max(octaves, min(octaves + 1, 4))
        strides = (1, 2) * depth if kernel == 3 else (2,) * depth
        per_octave = len(strides) // depth
        widths = [in_channels, *(width * min(2 ** (n // per_octave), DEEPEST) for n in range(len(strides)))]
        self.blocks = nn.Sequential(
            *(
                block(before, after, kernel=kernel, stride=stride, norm="none" if number == 0 else norm)
                for number, ((before, after), stride) in enumerate(zip(pairwise(widths), strides, strict=True))
            )
        )
        self.side = image_size
        for stride in strides:
            self.side = (self.side + 2 - kernel) // stride + 1
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

        The sides of the maps depend on `kernel`, an argument of the constructor. With `kernel` 4, each feature map has
        half the side of the previous one, rounded down. With `kernel` 3, every second block halves the side, rounded
        up.
        """
        x = images
        maps = {}
        for number, layer in enumerate(self.blocks, start=1):
            x = maps[f"block{number}"] = layer(x)
        return maps


def block(in_channels: int, out_channels: int, *, kernel: int, stride: int, norm: str) -> nn.Sequential:
    """Build a block of convolution, normalization and LeakyReLU.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride). The quotients are rounded down with
    `kernel` 4, and rounded up with `kernel` 3.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=1, bias=norm == "none")
    normalize = norm_layer(norm, out_channels)
    nn.init.normal_(conv.weight, std=INIT_STD)
    if isinstance(normalize, nn.BatchNorm2d):
        nn.init.normal_(normalize.weight, 1.0, INIT_STD)
    return nn.Sequential(conv, normalize, nn.LeakyReLU(SLOPE, inplace=True))
