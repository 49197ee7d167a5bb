"""Convolutional decoder from codes (latent vectors) to images, PSNR, and validation of images.

Autoencoders and GAN generators use the decoder. Each of its blocks doubles the side of the feature map:

    (N, dim) -> Linear -> (N, width, s, s) -> blocks [upsample x 2, 3x3 conv, BatchNorm, ReLU] -> 3x3 conv -> image

Here, s is the side of the first feature map. Nearest-neighbor upsampling before a convolution avoids the checkerboard
artifacts of transposed convolutions (Odena et al. 2016, https://distill.pub/2016/deconv-checkerboard). There are no
skip connections.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from sslcli.errors import ConfigError, check_positive
from sslcli.nn.modes import full_precision

NARROWEST = 64  # minimum number of channels of a block, e.g. 512-256-128-64 for images of 32 pixels


class Decoder(nn.Module):
    """Convolutional decoder for square images.

    Args:
        dim: code size.
        image_size: image side in pixels, at least 8.
        channels: image channels.
        width: channels of the first feature map. Each block halves the number of channels, but not below 64.

    The first feature map has a side of 4 to 7 pixels, and each block doubles the side. If no number of doublings gives
    a side of exactly `image_size` (e.g. 100), the decoder computes a larger image and center-crops it to `image_size`.

    Raises ValueError for arguments out of range.
    """

    def __init__(self, dim: int, *, image_size: int, channels: int = 3, width: int = 512) -> None:
        super().__init__()
        check_positive(dim=dim, channels=channels, width=width)
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}, but the decoder needs at least 8 pixels: enlarge the images")
        octaves = int(math.log2(image_size / 4))
        self.image_size = image_size
        self.smallest = math.ceil(image_size / 2**octaves)
        widths = [max(width >> octave, min(width, NARROWEST)) for octave in range(octaves + 1)]
        self.spread = nn.Linear(dim, width * self.smallest**2, bias=False)
        self.start = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        blocks = [up_block(before, after) for before, after in pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        """Decode (N, dim) -> (N, channels, image_size, image_size), without a final activation."""
        maps = self.spread(code).view(len(code), -1, self.smallest, self.smallest)
        images = self.to_image(self.blocks(self.start(maps)))
        start = (images.shape[-1] - self.image_size) // 2
        inside = slice(start, start + self.image_size)
        return images[..., inside, inside]  # type: ignore[no-any-return]


def up_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Build an upsampling block: (N, in_channels, H, W) -> (N, out_channels, 2H, 2W)."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def psnr(drawn: Tensor, images: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB between images (N, C, H, W) in [0, 1], averaged over images.

    `drawn` are the generated images, and `images` are the original images. The ratio of one image is -10 log10(mean
    squared error), at most 100 dB.
    """
    error = (full_precision(drawn) - full_precision(images)).square().flatten(1).mean(1)  # (N,)
    return -10 * error.clamp_min(1e-10).log10().mean()


class FirstLook:
    """Callable that checks images at its first call only.

    It raises ConfigError unless the images have the shape and the range that the decoder generates, see `check_images`.
    The check is slow, because the CPU must wait for the device. `shape` is the shape (C, H, W) of one generated image.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape, self.passed = shape, False

    def __call__(self, images: Tensor) -> None:
        if not self.passed:
            check_images(images, self.shape)
            self.passed = True


def check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise ConfigError unless images (N, C, H, W) have the shape and the range that the decoder generates.

    `shape` is the shape (C, H, W) of one generated image. The range is [0, 1].
    """
    if tuple(images.shape[1:]) != shape:
        raise ConfigError(
            f"the views have the shape {tuple(images.shape[1:])}, but the decoder generates images of {shape}: set "
            "views.views.0.size to null"
        )
    lowest, highest = (float(value) for value in images.aminmax())
    if lowest < -1e-3 or highest > 1 + 1e-3:
        raise ConfigError(
            f"the images have values from {lowest:.3g} to {highest:.3g}, but the decoder generates values in [0, 1]: "
            "set views.normalize=false and views.color_space=rgb"
        )
