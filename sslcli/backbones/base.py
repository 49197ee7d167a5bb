"""Base class of all backbones. The backbone is the network that pre-training produces."""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """Network from images (N, C, H, W) to features (N, num_features).

    A subclass sets `num_features` and defines `forward`. A subclass that computes feature maps also defines `stages`,
    which returns them.

    Attributes:
        num_features: number of features per image.
        wrapped_name: for a backbone that only wraps a network of another package, the name of the attribute that holds
            this network. Exported weights omit this name from the names of parameters. For other backbones, "".
    """

    num_features: int
    wrapped_name: str = ""

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, num_features) of normalized floating-point images (N, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of all stages in one forward pass, as stage name -> (N, channels, height, width).

        A stage is a group of layers of the backbone. The stages are ordered from shallow to deep. Raises ValueError if
        the backbone has no feature maps.
        """
        raise ValueError(
            f"the backbone {type(self).__name__} returns features but no feature maps by stage: "
            "choose a resnet, small or vit backbone, or define stages(images) in your own"
        )
