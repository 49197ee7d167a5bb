"""Generator and discriminator that receive the latent code at several layers: the networks of BiGAN's official code.

Donahue et al. 2017  https://arxiv.org/abs/1605.09782
The networks are deconvnet_64 and convnet_64 of https://github.com/jeffdonahue/bigan/blob/8301961/net.py. The official
networks are for images of 64 pixels. The networks here are for images of 16 or more pixels.

Shapes: N images per process, C channels, S image side in pixels, D size of the latent code.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from sslcli.errors import check_positive

KERNEL = 5  # side of the kernels of all convolutions
SLOPE = 0.2  # negative slope of LeakyReLU in the discriminator
INIT_STD = 0.02  # initial standard deviation of weights
CODE_STD = INIT_STD * KERNEL**2  # the same for the layers that add the code: apply_cond multiplies by the kernel's area
SMALLEST_IMAGE = 16  # with 8 pixels, there would be no convolution at which the code could enter the discriminator


class ConditionalGenerator(nn.Module):
    """Transposed 5x5 convolutions of stride 2, which generate images from latent codes.

    A linear map of the code is added to the output of every convolution except the last.

    Args:
        dim: size D of the latent code.
        image_size: image side S in pixels, at least 16.
        channels: image channels C.
        width: channels of the first feature map. Each further feature map has half as many as the one before it. With
            S = 64, the channels are 8, 4, 2 and 1 times `--gen_net_size` of the official code.

    Raises ValueError for arguments out of range.
    """

    def __init__(self, dim: int, *, image_size: int, channels: int = 3, width: int = 512) -> None:
        super().__init__()
        check_positive(dim=dim, channels=channels, width=width)
        octaves = num_octaves(image_size)
        if width % 2 ** (octaves - 1):
            raise ValueError(
                f"width is {width}, but it is halved {octaves - 1} times for images of {image_size} pixels, "
                f"so it must be a multiple of {2 ** (octaves - 1)}"
            )
        self.image_size = image_size
        self.smallest = math.ceil(image_size / 2**octaves)
        widths = [width >> octave for octave in range(octaves)]
        # As in the official code, BatchNorm treats each value of the first map as a separate channel (`bn_flat`).
        self.spread = nn.Linear(dim, width * self.smallest**2, bias=False)
        self.start = nn.Sequential(nn.BatchNorm1d(width * self.smallest**2), nn.ReLU())
        self.layers = nn.ModuleList(
            ConditionalLayer(transposed(before, after), dim, after, nn.ReLU()) for before, after in pairwise(widths)
        )
        self.to_image = transposed(widths[-1], channels)
        initialize(self)

    def forward(self, code: Tensor) -> Tensor:
        """Generate images from codes: (N, D) -> (N, C, S, S). The caller must apply the final tanh.

        Let v be the output of the last convolution. The official code computes sigmoid(v) and scales the result to
        [-1, 1], which equals tanh(v / 2). This function therefore returns v / 2.
        """
        maps = self.start(self.spread(code)).view(len(code), -1, self.smallest, self.smallest)
        for layer in self.layers:
            maps = layer(maps, code)
        images = self.to_image(maps) / 2
        start = (images.shape[-1] - self.image_size) // 2
        inside = slice(start, start + self.image_size)
        return images[..., inside, inside]  # type: ignore[no-any-return]


class ConditionalDiscriminator(nn.Module):
    """5x5 convolutions of stride 2 with LeakyReLU, which compute one logit per pair of an image and a latent code.

    A linear map of the code is added to the output of every convolution except the first. The first convolution has no
    BatchNorm. The last layer starts with zero weights, so all logits are 0 at first.

    Args:
        dim: size D of the latent code.
        image_size: image side S in pixels, at least 16. The last feature map has a side of 4 to 7 pixels.
        channels: image channels C.
        width: channels of the first feature map. Each further feature map has twice as many as the one before it.

    Raises ValueError for arguments out of range.
    """

    def __init__(self, dim: int, *, image_size: int, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        check_positive(dim=dim, channels=channels, width=width)
        octaves = num_octaves(image_size)
        widths = [width << octave for octave in range(octaves)]
        self.first = nn.Sequential(convolution(channels, width), nn.LeakyReLU(SLOPE))
        self.layers = nn.ModuleList(
            ConditionalLayer(convolution(before, after), dim, after, nn.LeakyReLU(SLOPE))
            for before, after in pairwise(widths)
        )
        side = image_size
        for _ in range(octaves):
            side = (side + 1) // 2
        self.to_logit = nn.Linear(widths[-1] * side**2, 1, bias=False)
        initialize(self)
        nn.init.zeros_(self.to_logit.weight)

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        """Return logits (2N, 1) for images (2N, C, S, S) in [0, 1] and codes (2N, D).

        The first half of the rows are real pairs: an image of the dataset and its code from the encoder. The second
        half are generated pairs: a random code and the image generated from it. BatchNorm normalizes each half by its
        own statistics, as the official code of BiGAN does if its option `--cat_inputs` is not set.
        """
        halves = zip(images.chunk(2), codes.chunk(2), strict=True)
        return torch.cat([self.logits(2 * x - 1, z) for x, z in halves])

    def logits(self, images: Tensor, codes: Tensor) -> Tensor:
        """Return logits (N, 1) for images (N, C, S, S) in [-1, 1] and codes (N, D).

        All pairs of an image and a code must be of one kind, real or generated.
        """
        maps = self.first(images)
        for layer in self.layers:
            maps = layer(maps, codes)
        return self.to_logit(maps.flatten(1))  # type: ignore[no-any-return]


class ConditionalLayer(nn.Module):
    """Convolution plus a linear map of the latent code, then BatchNorm and activation.

    The linear map adds one value per channel to all positions, as the function `apply_cond` of BiGAN's official code
    does.
    """

    def __init__(self, convolution: nn.Module, dim: int, out_channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution
        self.of_code = nn.Linear(dim, out_channels, bias=False)
        self.normalize = nn.BatchNorm2d(out_channels)
        self.activation = activation

    def forward(self, maps: Tensor, codes: Tensor) -> Tensor:
        """Map feature maps (N, in_channels, H, W) and codes (N, D) to feature maps (N, out_channels, H', W').

        H' and W' are the height and width of the output of the convolution.
        """
        added = self.of_code(codes)[:, :, None, None]
        return self.activation(self.normalize(self.convolution(maps) + added))  # type: ignore[no-any-return]


def num_octaves(image_size: int) -> int:
    """Return how often the image side is halved to reach 4 to 7 pixels.

    Raises ValueError if `image_size` is below `SMALLEST_IMAGE`.
    """
    if image_size < SMALLEST_IMAGE:
        raise ValueError(
            f"image_size is {image_size}, but the conditional networks need at least {SMALLEST_IMAGE} pixels: "
            "enlarge the images"
        )
    return int(math.log2(image_size / 4))


def convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Build a 5x5 convolution without bias that halves the side."""
    return nn.Conv2d(in_channels, out_channels, KERNEL, stride=2, padding=KERNEL // 2, bias=False)


def transposed(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """Build a transposed 5x5 convolution without bias that doubles the side."""
    return nn.ConvTranspose2d(
        in_channels, out_channels, KERNEL, stride=2, padding=KERNEL // 2, output_padding=1, bias=False
    )


def initialize(module: nn.Module) -> None:
    """Draw all weights from normal distributions with mean 0.

    The standard deviation is 0.5 for the linear maps of the latent code, and 0.02 for all other layers.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(part.weight, std=INIT_STD)
    for part in module.modules():
        if isinstance(part, ConditionalLayer):
            nn.init.normal_(part.of_code.weight, std=CODE_STD)
