"""Base class of all methods: a backbone plus one self-supervised objective, whose `forward` is the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.mixture import UnMix
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
    """A backbone plus one self-supervised objective. Every member that the rest of sslcli uses is declared here.

    A subclass takes the backbone and keyword hyperparameters, computes its loss in `forward`, and updates its own
    state (momentum encoder, queue, memory bank) in `after_step` alone, so that a loss always reads the state before
    the step. `forward` and `num_views` are the only members that a subclass must define.

    Attributes:
        num_views: the number of views per image that `forward` takes.
        in_batch: True if the loss uses in-batch negatives; then implement `embed` and `compare`.
        color_spaces: the color spaces that the views may have; empty = any.
        falling: the scalar that decreases in a good run; adversarial losses need not.
        by_block: True if FSDP and activation checkpointing may wrap single blocks of the backbone; False if the method
            calls the backbone with other weights than its own.
        embeddings: of the last forward, detached, one (N, D) per view; what health measures look at.
        head_layers: the number of layers of the projection head that `head_features` gives; 0 = none.
        finetune_layer: the layer of the head that fine-tuning starts from; 0 = the backbone.
        mixture: the self-mixture of views that the method was given, or None.
    """

    num_views: int
    in_batch: bool = False
    color_spaces: tuple[str, ...] = ()
    falling: str = "loss"
    by_block: bool = True
    embeddings: tuple[Tensor, ...] = ()
    head_layers: int = 0
    finetune_layer: int = 0
    mixture: UnMix | None

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.mixture = None

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

    def head_features(self, images: Tensor, layer: int) -> Tensor:
        """Features inside the projection head: (N, C, H, W) -> (N, D) after `layer`, 1 to `head_layers`.

        Raises ValueError for another layer; only methods with `head_layers` above 0 have any.
        """
        raise ValueError(f"layer is {layer}, but {type(self).__name__} gives no features inside its head")

    def stored(self) -> Tensor | None:
        """The rows (n, D) of a memory bank, one per training image in the order of the split; None without a bank."""
        return None

    @property
    def queue_length(self) -> int:
        """The number of embeddings in the queue of negatives; 0 without a queue."""
        return 0

    def num_negatives(self, batch_size: int) -> int | None:
        """The number of negatives per query for a micro-batch of `batch_size` images; None if that means nothing."""
        return None

    def param_groups(self) -> list[dict[str, Any]] | None:
        """Parameter groups for the optimizer, as torch takes them; None = `sslcli.optim.parameter_groups` decides."""
        return None

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Pictures worth looking at during training, by name: rows of images, each (n, C, H, W) as `images` is.

        `images` are a few held-out ones as probes see them; the method is in evaluation mode and draws no noise.
        """
        return {}

    def effective(self, batch_size: int) -> dict[str, Any]:
        """Facts about a step for the startup table, by name, for a micro-batch of `batch_size` images in all."""
        negatives = self.num_negatives(batch_size)
        return {} if negatives is None else {"negatives a query sees": negatives}


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
