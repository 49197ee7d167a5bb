"""What a method is: one self-supervised objective around a backbone, whose `forward` is the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.nn import evaluating


@dataclass(frozen=True)
class Batch:
    """The images of one step on one process."""

    views: list[Tensor]  # one (N, C, H, W) tensor a view
    index: Tensor  # (N,) position in the training set, for memory banks
    label: Tensor  # (N,) for probes alone; a method never reads it
    present: Tensor | None = None  # (N, M) bool, which of M modalities an image has; None = all

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies from pinned memory do not wait."""
        views = [view.to(device, non_blocking=True) for view in self.views]
        present = None if self.present is None else self.present.to(device, non_blocking=True)
        index, label = (rows.to(device, non_blocking=True) for rows in (self.index, self.label))
        return Batch(views, index, label, present)


class Method(nn.Module):
    """One self-supervised objective around a backbone.

    A subclass takes the backbone and keyword hyper-parameters, computes its loss in `forward` and changes its own
    state (momentum network, queue, bank) in `after_step` alone, so that a loss always reads the state of before.
    """

    num_views: int
    in_batch: bool = False  # whether the loss compares the images of a batch; `embed` and `compare` divide it then
    color_spaces: tuple[str, ...] = ()  # one of which the views must have; empty: any
    falling: str = "loss"  # the scalar a good run brings down; the loss of a game between two players is none
    by_block: bool = (
        True  # the backbone may be sharded and computed again by block; not where others' weights replace its
    )
    embeddings: tuple[Tensor, ...] = ()  # of the last forward, detached, one (N, D) a view: what health looks at

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name: the loop differentiates `loss` and logs them all."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The part of `forward` that takes images one by one: tensors with one row an image, for `compare`.

        Only methods with `in_batch` have it. It changes no state but that of BatchNorm.
        """
        raise NotImplementedError(f"{type(self).__name__} does not divide its loss")

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The rest of `forward`: the scalars of what `embed` gives for a batch."""
        raise NotImplementedError(f"{type(self).__name__} does not divide its loss")

    def after_step(self, progress: float) -> None:
        """Called after every optimizer step; `progress` = t / T for the 0-based step t of T."""

    def check_views(self, views: list[Tensor]) -> None:
        """Raise ValueError unless views like these, one (2, C, H, W) a view, can be trained on.

        Called once before training, in evaluation mode, with noise of black, white and the purest colours.
        """

    def features(self, images: Tensor) -> Tensor:
        """What probes and exports see: (N, C, H, W) -> (N, num_features)."""
        return self.backbone(images)  # type: ignore[no-any-return]

    def projection(self, images: Tensor) -> Tensor:
        """What the loss sees of an image, before normalisation: (N, C, H, W) -> (N, D); features by default."""
        return self.features(images)

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Pictures worth looking at during training, by name: rows of images, each (n, C, H, W) as `images` is.

        `images` are a few held-out ones as probes see them; the method is in evaluation mode and draws no noise.
        """
        return {}

    def effective(self, batch_size: int) -> dict[str, Any]:
        """Facts about a step worth printing before training, for a micro-batch of `batch_size` images in all."""
        return {}


def maps_of(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The backbone's maps by stage of `images` (N, C, H, W) in evaluation mode, without gradient.

    Raises ValueError for a backbone without stages, and for images that it does not take.
    """
    name = type(backbone).__name__
    if not hasattr(backbone, "stages"):
        raise ValueError(
            f"this method needs feature maps, but the backbone {name} has no stages(images): take a resnet, small, vit "
            "or timm backbone, or define stages(images) -> dict of maps in your own"
        )
    try:
        with evaluating(backbone), torch.no_grad():
            return backbone.stages(images)  # type: ignore[operator, no-any-return]
    except RuntimeError as error:
        raise ValueError(
            f"the backbone {name} gives no maps of images of {images.shape[-1]} pixels ({error}): "
            "take larger images or another backbone"
        ) from error


def num_features(backbone: nn.Module) -> int:
    """The feature width of a backbone. Raises ValueError where the module does not say it."""
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise ValueError(
            f"the backbone {type(backbone).__name__} has no integer num_features: "
            "wrap it with sslcli.backbones.wrap.as_backbone, which finds the width by a dry forward"
        )
    return width
