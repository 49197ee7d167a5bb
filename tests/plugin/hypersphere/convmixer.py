"""ConvMixer: patch embedding, then depthwise and pointwise convolutions at a fixed resolution.

Trockman, Kolter 2022  https://arxiv.org/abs/2201.09792   conf/backbone/convmixer.yaml

Shapes: N images, P = image side / patch_size.
"""

from __future__ import annotations

from torch import Tensor, nn

from sslcli.backbones.base import Backbone


def activated(convolution: nn.Conv2d) -> nn.Sequential:
    """Return a convolution, followed by GELU and BatchNorm."""
    return nn.Sequential(convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels))


class Block(nn.Module):
    """Depthwise convolution with residual connection, then pointwise convolution: (N, width, P, P) -> same shape."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.spatial = activated(nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width))
        self.channels = activated(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(x + self.spatial(x))


class ConvMixer(Backbone):
    """ConvMixer without classifier; num_features = width.

    Args:
        image_size: side of the training images in pixels, a multiple of `patch_size`.
        width: channels of all feature maps.
        depth: number of blocks.
        kernel_size: kernel size of the depthwise convolutions, odd.
        patch_size: side of a patch in pixels.
        in_channels: number of image channels.

    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        width: int = 64,
        depth: int = 4,
        kernel_size: int = 5,
        patch_size: int = 4,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth is {depth}, but ConvMixer needs at least 1 block")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, but it must be odd to keep the size of the feature maps")
        if image_size % patch_size:
            raise ValueError(f"image_size is {image_size}, but it must be a multiple of patch_size={patch_size}")
        self.num_features = width
        self.patches = activated(nn.Conv2d(in_channels, width, patch_size, stride=patch_size))
        self.blocks = nn.Sequential(*(Block(width, kernel_size) for _ in range(depth)))

    def forward(self, images: Tensor) -> Tensor:
        """Return the output of the last block, averaged over height and width: (N, in_channels, H, W) -> (N, width)."""
        return self.stages(images)[f"block{len(self.blocks)}"].mean((2, 3))

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps (N, width, P, P) by stage name: `patches`, `block1`, `block2`, ..."""
        x = self.patches(images)
        maps = {"patches": x}
        for number, block in enumerate(self.blocks, start=1):
            x = maps[f"block{number}"] = block(x)
        return maps
