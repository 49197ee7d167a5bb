"""Backbones from the timm library (https://github.com/huggingface/pytorch-image-models), without the classifier.

conf/backbone/timm.yaml; timm is an optional dependency: pip install timm
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.backbones.wrap import dry_output, pooled


class Timm(Backbone):
    """Backbone from the timm model `name`.

    Parameters have timm's names with the prefix `model.`. Exported weights omit this prefix.

    Args:
        name: a name from timm.list_models(), with or without a weights tag, or "hf-hub:owner/model".
        image_size: image side in pixels. It is passed to models that are built for a fixed size (ViT, Swin ...).
        in_channels: image channels.
        pretrained: load timm's weights instead of random initialization. The first use downloads the weights.
        options: additional keyword arguments for timm.create_model, e.g. {"drop_path_rate": 0.1}.

    Attributes:
        arguments: the arguments of timm.create_model that describe the architecture of the model.

    Raises ValueError if timm cannot be imported, has no model `name`, or cannot build the model with these arguments.
    """

    wrapped_name = "model"

    def __init__(
        self,
        name: str,
        *,
        image_size: int,
        in_channels: int = 3,
        pretrained: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.model, self.arguments = create(
            name, image_size=image_size, in_channels=in_channels, pretrained=pretrained, options=dict(options or {})
        )
        self.pretrained = pretrained
        # If the model has another layer before the classifier, timm's num_features is not the width of the output.
        self.num_features = dry_output(self.model, image_size=image_size, in_channels=in_channels).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Return features: (N, in_channels, H, W) -> (N, num_features)."""
        return pooled(self.model(images))

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of timm's forward_intermediates.

        They are named `stage1`, `stage2` and so on, and have shape (N, channels, height, width). A ViT has one feature
        map per block. Raises ValueError if timm has no feature maps for the model.
        """
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(
                f"timm has no feature maps by stage for {type(self.model).__name__}: choose another model, a resnet or "
                "small"
            )
        maps = self.model.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)  # type: ignore[operator]
        return {f"stage{number}": each for number, each in enumerate(maps, start=1)}


def create(
    name: str, *, image_size: int, in_channels: int, pretrained: bool, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Create the timm model `name` without classifier. For the arguments, see `Timm`.

    Returns the model, and the arguments of timm.create_model that describe its architecture.

    Raises ValueError if timm cannot be imported, has no model `name`, or cannot build the model with these arguments.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"backbone=timm needs the package timm, which cannot be imported ({error}): pip install timm"
        ) from error
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f"; the nearest are: {', '.join(near)}" if near else "; timm.list_models() lists all"
        raise ValueError(f"timm {getattr(timm, '__version__', '')} has no model {name!r}{hint}")
    arguments = {"pretrained": pretrained, "num_classes": 0, "in_chans": in_channels, **options}
    try:
        with without_pickles():
            model, arguments = _built(timm, name, image_size, arguments)
    except Exception as error:  # any cause: a failed download, an invalid option, a wrong size
        raise ValueError(
            f"timm cannot build {name!r} with image_size={image_size}, {arguments}: {type(error).__name__}: {error}"
        ) from error
    return model, {key: value for key, value in arguments.items() if key not in ("pretrained", "num_classes")}


def _built(timm: Any, name: str, image_size: int, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model, and all arguments it was built with."""
    sized = {"img_size": image_size, **arguments}
    try:
        return timm.create_model(name, **sized), sized
    except TypeError as error:
        if "img_size" not in str(error):  # convolutional models accept any image size and have no argument img_size
            raise
    return timm.create_model(name, **arguments), arguments


@contextmanager
def without_pickles() -> Iterator[None]:
    """Force torch.load to use weights_only=True within the `with` block, whatever arguments timm passes to torch.load.

    Older versions of timm unpickle entire weight files. Unpickling can execute arbitrary code.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ |= {name: value for name, value in before.items() if value is not None}
