"""Base class of all backbones. The backbone is the network that pre-training produces."""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """Network from images (N, C, H, W) to features (N, num_features).

    A subclass sets `num_features` and defines `forward`. A subclass that computes feature maps also defines `stages`,
    which returns them. A subclass that divides images into patches may also set `patch_size` and define `tokens`.
    Methods that mask patches need both.

    Attributes:
        num_features: number of features per image.
        wrapped_name: for a backbone that only wraps a network of another package, the name of the attribute that holds
            this network. Exported weights omit this name from the names of parameters. For other backbones, "".
        patch_size: side of a patch in pixels, for backbones that define `tokens`. For other backbones, None.
        pretrained: True if the weights are not random, so that no method may shuffle them.
        num_prefix_tokens: number of tokens before the patch tokens in the output of `tokens`, such as 1 class token.
    """

    num_features: int
    wrapped_name: str = ""
    patch_size: int | None = None
    pretrained: bool = False
    num_prefix_tokens: int = 0

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, num_features) of normalized floating-point images (N, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of all stages in one forward pass, as stage name -> (N, channels, height, width).

        A stage is a group of layers of the backbone. The stages are ordered from shallow to deep. A backbone that
        defines `tokens` has the stage "patches": its patch tokens, with the shape (N, num_features, rows, columns).
        Raises ValueError if the backbone has no feature maps.
        """
        if self.patch_size is not None:
            tokens, grid = self.tokens(images)
            patches = tokens[:, self.num_prefix_tokens :]
            return {"patches": patches.transpose(1, 2).reshape(len(patches), -1, *grid)}
        raise ValueError(
            f"the backbone {type(self).__name__} returns features but no feature maps by stage: "
            "choose a resnet, small or vit backbone, or define stages(images) in your own"
        )

    def tokens(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Return the output tokens, and the patch grid (rows, columns), for methods that mask patches.

        The tokens are (N, num_prefix_tokens + P, num_features). P is rows * columns, or K with `keep`.

        Args:
            images: (N, C, H, W). H and W are multiples of `patch_size`.
            mask: (N, rows * columns) bool. True replaces the embedding of a patch with `mask_token`, before the
                position embedding is added. The patches are ordered row by row.
            mask_token: tensor that is broadcast to (N, rows * columns, num_features); required with `mask`.
            keep: (N, K) int64, indices of patches. All other patches are dropped after the position embedding was
                added. The patch tokens have the order of the indices. None keeps all patches.

        Raises ValueError if the backbone has no patch tokens.
        """
        raise ValueError(
            f"the backbone {type(self).__name__} has no patch tokens: choose backbone=vit_tiny, vit_small or vit_base, "
            "or define patch_size and tokens(images, mask, mask_token, keep) in your own"
        )
