"""Input of the linear layer that computes a code: the features of a backbone, or all values of its last feature map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslcli.methods.base import maps_of, num_features

SOURCES = ("features", "map")


def check_code_from(code_from: str) -> None:
    """Raise ValueError unless `code_from` is features or map."""
    if code_from not in SOURCES:
        raise ValueError(f"code_from is {code_from!r}, but it must be one of {', '.join(SOURCES)}")


def code_input_width(backbone: nn.Module, code_from: str, *, image_size: int, channels: int) -> int:
    """Return the number of values per image that `code_input` returns, for images (N, channels, S, S), S = image_size.

    Raises ValueError if `code_from` is map and the backbone has no feature maps.
    """
    if code_from == "features":
        return num_features(backbone)
    *_, last = maps_of(backbone, torch.zeros(2, channels, image_size, image_size)).values()
    return last[0].numel()


def code_input(backbone: nn.Module, code_from: str, images: Tensor) -> Tensor:
    """Return the input of the linear layer: (N, C, S, S) -> (N, width). width is that of `code_input_width`.

    code_from: features = the output of the backbone, which for most backbones is a mean over positions. map = the
        values of the last feature map at all positions.
    """
    if code_from == "features":
        return backbone(images)  # type: ignore[no-any-return]
    *_, last = backbone.stages(images).values()  # type: ignore[operator]
    return last.flatten(1)  # type: ignore[no-any-return]
