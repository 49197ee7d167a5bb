"""Base class of all methods: a backbone plus one self-supervised objective, whose `forward` is the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.config.moved import reject_old_attributes
from sslcli.methods.mixture import UnMix
from sslcli.nn.modes import evaluating

RENAMED = {  # old name of a class attribute in version 0.1 -> current name
    "in_batch": "uses_in_batch_negatives",
    "falling": "decreasing_metric",
    "by_block": "supports_block_wrapping",
}


@dataclass(frozen=True)
class Batch:
    """The images of one step on one process."""

    views: list[Tensor]  # one (N, C, H, W) tensor per view
    index: Tensor  # (N,) position in the training set, for memory banks
    label: Tensor  # (N,) class labels, only for probes; methods must not read them
    present: Tensor | None = None  # (N, M) bool, which of M modalities an image has; None = all

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; copies from pinned memory are asynchronous."""
        views = [view.to(device, non_blocking=True) for view in self.views]
        present = None if self.present is None else self.present.to(device, non_blocking=True)
        index, label = (rows.to(device, non_blocking=True) for rows in (self.index, self.label))
        return Batch(views, index, label, present)


class Method(nn.Module):
    """A backbone plus one self-supervised objective. This class declares every member that the rest of sslcli uses.

    The constructor of a subclass takes the backbone and keyword hyperparameters; `forward` computes the loss. A
    subclass updates its own state (momentum encoder, queue, memory bank) only in `after_step`, so the loss always uses
    the state from before the step. `forward` and `num_views` are the only members that a subclass must define.

    Attributes:
        num_views: the number of views per image that `forward` takes.
        uses_in_batch_negatives: True if the loss uses in-batch negatives; then implement `embed` and `compare`.
        color_spaces: the color spaces that the views may have; empty = any.
        decreasing_metric: the name of a scalar that is expected to decrease during training (adversarial losses need
            not).
        supports_block_wrapping: True if FSDP and activation checkpointing may wrap single blocks of the backbone. Must
            be False if the method calls the backbone with weights other than the backbone's own parameters.
        embeddings: detached embeddings of the last forward pass, one (N, D) per view; input of the health metrics.
        head_layers: the number of projection head layers available from `head_features`; 0 = none.
        finetune_layer: the layer of the head from which fine-tuning starts; 0 = the backbone.
        mixture: the self-mixture of views passed to the method, or None.
    """

    num_views: int
    uses_in_batch_negatives: bool = False
    color_spaces: tuple[str, ...] = ()
    decreasing_metric: str = "loss"
    supports_block_wrapping: bool = True
    embeddings: tuple[Tensor, ...] = ()
    head_layers: int = 0
    finetune_layer: int = 0
    mixture: UnMix | None

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Raise ConfigError if a subclass sets an attribute under its name in version 0.1, which has no effect now."""
        super().__init_subclass__(**keywords)
        reject_old_attributes(cls, RENAMED)

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.mixture = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalars. The training loop backpropagates the scalar `loss` and logs all scalars."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the inputs of `compare`: tensors with one row per image, each computed from that image alone.

        Only methods with `uses_in_batch_negatives` implement it. The call may change BatchNorm statistics, but no other
        state.
        """
        raise NotImplementedError(f"{type(self).__name__} does not divide its loss")

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the scalars of `forward` for the output of `embed` on the whole batch."""
        raise NotImplementedError(f"{type(self).__name__} does not divide its loss")

    def after_step(self, progress: float) -> None:
        """Update the method's state after an optimizer step; `progress` = t / T for the 0-based step t of T."""

    def check_views(self, views: list[Tensor]) -> None:
        """Raise ValueError unless the method can train on views of this shape and range, one (2, C, H, W) per view.

        Called once before training, in evaluation mode, with noise images whose pixels are black, white or fully
        saturated colors.
        """

    def features(self, images: Tensor) -> Tensor:
        """Return the features that probes and exports use: (N, C, H, W) -> (N, num_features)."""
        return self.backbone(images)  # type: ignore[no-any-return]

    def projection(self, images: Tensor) -> Tensor:
        """Return the input of the loss, before normalization: (N, C, H, W) -> (N, D). By default, the features."""
        return self.features(images)

    def head_features(self, images: Tensor, layer: int) -> Tensor:
        """Return the features inside the projection head: (N, C, H, W) -> (N, D) after `layer`, 1 to `head_layers`.

        Raises ValueError for any other layer. Only methods with `head_layers` above 0 implement it.
        """
        raise ValueError(f"layer is {layer}, but {type(self).__name__} has no features inside its head")

    def stored(self) -> Tensor | None:
        """Return the rows (n, D) of the memory bank, one per training image, in split order; None without a bank."""
        return None

    @property
    def queue_length(self) -> int:
        """Number of embeddings in the queue of negatives; 0 without a queue."""
        return 0

    def num_negatives(self, batch_size: int) -> int | None:
        """Return the number of negatives per query for a micro-batch of `batch_size` images; None if undefined."""
        return None

    def param_groups(self) -> list[dict[str, Any]] | None:
        """Return the optimizer's parameter groups in torch's format; None = groups from `sslcli.engine.optim`."""
        return None

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Return named image grids to save during training: lists of rows, each (n, C, H, W) like `images`.

        `images` are a few held-out images with the transform of the probes. Called in evaluation mode. The method must
        not draw random numbers from `self.noise`, since this would change the training.
        """
        return {}

    def effective(self, batch_size: int) -> dict[str, Any]:
        """Return named facts for the startup table, for a micro-batch of `batch_size` images over all processes."""
        negatives = self.num_negatives(batch_size)
        return {} if negatives is None else {"negatives per query": negatives}


def maps_of(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the backbone's feature maps of `images` (N, C, H, W) by stage, in evaluation mode, without gradient.

    Raises ValueError for a backbone without stages and for images that the backbone does not accept.
    """
    name = type(backbone).__name__
    if not hasattr(backbone, "stages"):
        raise ValueError(
            f"this method needs feature maps, but the backbone {name} has no stages(images): choose a resnet, small, "
            "vit or timm backbone, or define stages(images) -> dict of maps in your own"
        )
    try:
        with evaluating(backbone), torch.no_grad():
            return backbone.stages(images)  # type: ignore[operator, no-any-return]
    except RuntimeError as error:
        raise ValueError(
            f"the backbone {name} returns no feature maps for images of {images.shape[-1]} pixels ({error}): "
            "use larger images or another backbone"
        ) from error


def num_features(backbone: nn.Module) -> int:
    """Return the feature width of a backbone. Raises ValueError if the module has no integer `num_features`."""
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise ValueError(
            f"the backbone {type(backbone).__name__} has no integer num_features: "
            "wrap it with sslcli.backbones.wrap.as_backbone, which finds the width by a dry forward"
        )
    return width
