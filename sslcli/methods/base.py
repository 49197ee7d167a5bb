"""Base class of all methods: a backbone plus one self-supervised objective, whose `forward` is the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.config.moved import reject_old_attributes
from sslcli.distributed.devices import copy_to
from sslcli.methods.mixture import UnMix
from sslcli.nn.assignments import Assignments
from sslcli.nn.modes import evaluating

RENAMED = {  # old name of a class attribute in version 0.1 -> current name
    "in_batch": "uses_in_batch_negatives",
    "falling": "decreasing_metric",
    "by_block": "supports_block_wrapping",
}


@dataclass(frozen=True)
class Batch:
    """The views of N images: the micro-batch of one process."""

    views: list[Tensor]  # one (N, C, H, W) tensor per view
    index: Tensor  # (N,) index of each image in the training split; memory banks use it to find the image's row
    label: Tensor  # (N,) class labels, -1 = unknown, only for evaluation; methods must not read them
    present: Tensor | None = None  # (N, M) bool: True if image n has modality m; None = all are present

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`. Copies from pinned memory to a CUDA device are asynchronous."""
        present = None if self.present is None else copy_to(device, self.present)
        views = [copy_to(device, view) for view in self.views]
        return Batch(views, copy_to(device, self.index), copy_to(device, self.label), present)


class GroupOptions(TypedDict, total=False):
    """Options of parameters that the optimizer treats differently. All are optional."""

    lr_scale: float  # factor of the learning rate
    wd_scale: float  # factor of the weight decay; has no effect on parameters without weight decay
    constant_lr: bool  # True: the peak learning rate at every step, without warmup and schedule
    frozen_epochs: float  # epochs at the start of the run, at most a quarter of it, in which there is no update


class Method(nn.Module):
    """A backbone plus one self-supervised objective. This class declares every member that the rest of sslcli uses.

    A subclass must define only `forward` and `num_views`. The arguments of its constructor are the backbone and keyword
    hyperparameters. `forward` computes the loss. A subclass updates its own state (momentum encoder, queue, memory
    bank) only in `after_step`. The loss of a step therefore always uses the state before this step.

    Attributes:
        num_views: the number of views per image that `forward` takes, at least 1. The default 0 is not valid, so
            every subclass must set a value.
        uses_in_batch_negatives: True if the loss uses in-batch negatives. In this case, implement `embed` and
            `compare`.
        color_spaces: the color spaces that the views may have; empty = any.
        decreasing_metric: the name of a scalar that is expected to decrease during training. An adversarial loss need
            not decrease, so adversarial methods name a different scalar.
        supports_block_wrapping: True if FSDP and activation checkpointing may wrap single blocks of the backbone. Must
            be False if the method calls the backbone with weights other than the backbone's own parameters.
        evaluated_part: the dotted name of the network that `features` calls and that ssl-export writes, such as
            "teacher.backbone". It must have the parameters of the backbone by name. Probes, k-NN and pictures use it.
        differentiates_twice: True if the loss contains gradients, as a gradient penalty does. torch.compile does not
            support such a loss, so only the backbone is compiled.
        has_varying_shapes: True if tensors in `forward` have other shapes in every step. torch.compile would compile
            each of them, so only the backbone is compiled.
        embeddings: detached embeddings of the last forward pass, one tensor (N, D) per view. The health metrics are
            computed from them.
        assignments: summary of the last forward pass of a method that assigns images to prototypes, see `summarize` in
            sslcli.nn.assignments. The collapse detection also uses it. None = the method has no assignments.
        head_layers: the number of layers of the projection head whose output `head_features` can return; 0 = none.
        finetune_layer: fine-tuning starts from the output of this layer of the projection head; 0 = the output of the
            backbone.
        mixture: the `UnMix` module that mixes the images of a batch with each other, or None = images are not mixed.
    """

    num_views: int = 0
    uses_in_batch_negatives: bool = False
    color_spaces: tuple[str, ...] = ()
    decreasing_metric: str = "loss"
    supports_block_wrapping: bool = True
    differentiates_twice: bool = False
    has_varying_shapes: bool = False
    evaluated_part: str = "backbone"
    embeddings: tuple[Tensor, ...] = ()
    assignments: Assignments | None = None
    head_layers: int = 0
    finetune_layer: int = 0
    mixture: UnMix | None

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Raise ConfigError if a subclass sets an attribute that was renamed after version 0.1.

        Without this error, the attribute with the old name would be ignored.
        """
        super().__init_subclass__(**keywords)
        reject_old_attributes(cls, RENAMED)

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.mixture = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalar tensors by name. The training loop logs them, and calls `backward` on the scalar "loss"."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the inputs of `compare` for a micro-batch: tensors with one row per image.

        A row is computed from its image alone, so that the rows of several micro-batches can be concatenated. Only
        methods with `uses_in_batch_negatives` implement `embed`. A call of `embed` may change BatchNorm statistics, but
        no other state.
        """
        raise NotImplementedError(f"{type(self).__name__} does not divide its loss")

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the scalars that `forward` would return for the whole batch.

        `rows` are the outputs of `embed` for all micro-batches, concatenated.
        """
        raise NotImplementedError(f"{type(self).__name__} does not divide its loss")

    def before_step(self, progress: float, epoch: float) -> None:
        """Set the values that `forward` needs and that change during the run, such as a teacher temperature.

        Write such a value to a buffer with `fill_`: attributes that are Python numbers would recompile a compiled
        method at every step. Compute the value from the arguments alone, so that a resumed run has the same value.

        Args:
            progress: t / T for the 0-based step t of T, as in `after_step`.
            epoch: number of epochs before this step, with its fraction: t / steps per epoch.
        """

    def after_step(self, progress: float) -> None:
        """Update the state of the method after an optimizer step; `progress` is t / T for the 0-based step t of T."""

    def scheduled(self, progress: float) -> dict[str, float]:
        """Return the values that `after_step` derives from `progress`, such as the EMA momentum, by name.

        `progress` is t / T for the 0-based step t of T. If a run is extended, the values of the old and the new
        schedule are printed.
        """
        return {}

    def check_views(self, views: list[Tensor]) -> None:
        """Raise ValueError if the method cannot train on views of this shape or value range.

        `views` contains one tensor (2, C, H, W) per view, computed from two images. To cover the whole value range, the
        pixels of the images are random black, white or saturated colors. `check_views` is called once before training,
        in evaluation mode.
        """

    @property
    def evaluated_network(self) -> nn.Module:
        """The network that probes and exports use: the submodule that `evaluated_part` names."""
        return self.get_submodule(self.evaluated_part)

    def features(self, images: Tensor) -> Tensor:
        """Return the features for probes and exports: (N, C, H, W) -> (N, num_features)."""
        return self.evaluated_network(images)  # type: ignore[no-any-return]

    def projection(self, images: Tensor) -> Tensor:
        """Return the input of the loss before normalization: (N, C, H, W) -> (N, D).

        By default, the features are returned.
        """
        return self.features(images)

    def head_features(self, images: Tensor, layer: int) -> Tensor:
        """Return the output of one layer of the projection head: (N, C, H, W) -> (N, D).

        `layer` is 1 to `head_layers`. Raises ValueError for any other layer. Only methods whose `head_layers` is above
        0 implement this method.
        """
        raise ValueError(f"layer is {layer}, but {type(self).__name__} has no features inside its head")

    def stored(self) -> Tensor | None:
        """Return the rows (n, D) of the memory bank, or None if the method has no memory bank.

        There is one row per training image, in the order of the training split.
        """
        return None

    @property
    def queue_length(self) -> int:
        """Number of embeddings in the queue of negatives; 0 if the method has no queue."""
        return 0

    def num_negatives(self, batch_size: int) -> int | None:
        """Return the number of negatives per query for a micro-batch of `batch_size` images.

        Return None if the method does not state this number. The startup table then does not show it.
        """
        return None

    def group_options(self) -> dict[str, GroupOptions]:
        """Return options of parameters that the optimizer treats differently.

        A key is the name of a parameter or of a module, such as "predictor", which stands for all its parameters. If
        several keys apply to a parameter, the longest key decides.
        """
        return {}

    def param_groups(self) -> list[dict[str, Any]] | None:
        """Return the parameter groups for a torch optimizer, or None to use the groups of `sslcli.engine.optim`.

        The groups may contain the keys of `GroupOptions`. To change the options of some parameters only, override
        `group_options` instead.
        """
        return None

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Return image grids by name, to be saved during training. A grid is a list of rows, each (n, C, H, W).

        `images` (n, C, H, W) contains a few images of the split "val", preprocessed as in evaluation. This method is
        called in evaluation mode. It must not draw random numbers from a `Noise` module of the method, because this
        would change the random numbers of the training.
        """
        return {}

    def effective(self, batch_size: int) -> dict[str, Any]:
        """Return rows of the startup table as title -> value.

        `batch_size` is the number of images in one micro-batch, summed over all processes. With
        `train.cached_gradients`, it is the number of images in a whole step, also summed over all processes.
        """
        negatives = self.num_negatives(batch_size)
        return {} if negatives is None else {"negatives per query": negatives}


def maps_of(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the feature maps of `images` (N, C, H, W) by stage name, in evaluation mode and without gradient.

    Raises ValueError if the backbone has no `stages`, or if it does not accept the images.
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


def token_backbone(backbone: nn.Module) -> Backbone:
    """Return `backbone`, for methods that mask patches. Raises ValueError if the backbone has no patch tokens."""
    if not isinstance(backbone, Backbone) or backbone.patch_size is None:
        raise ValueError(
            f"this method masks patches, but the backbone {type(backbone).__name__} has no patch tokens: choose "
            "backbone=vit_tiny, vit_small or vit_base, or define patch_size and tokens in your own (see Backbone)"
        )
    return backbone


def num_features(backbone: nn.Module) -> int:
    """Return the feature width of a backbone. Raises ValueError if the backbone has no integer `num_features`."""
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise ValueError(
            f"the backbone {type(backbone).__name__} has no integer num_features: "
            "wrap it with sslcli.backbones.wrap.as_backbone, which finds the width by a dry forward"
        )
    return width
