"""What a backbone is: the network that pre-training leaves behind."""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """Images (N, C, H, W) -> features (N, num_features).

    A subclass sets `num_features`, defines `forward`, and where it has feature maps also `stages`.
    """

    num_features: int

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W), floating point -> (N, num_features)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps (N, channels, height, width) by stage name, shallow to deep, all from one pass.

        Raises ValueError where the backbone has none to give.
        """
        raise ValueError(
            f"the backbone {type(self).__name__} gives features but no maps by stage: "
            "take a resnet, small or vit backbone, or define stages(images) in your own"
        )
