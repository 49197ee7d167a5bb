"""Conversion of any module that returns vectors or feature maps to a backbone."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.distributed.devices import unchanged_random_state
from sslcli.errors import check_positive
from sslcli.nn.modes import evaluating


def dry_output(module: nn.Module, *, image_size: int, in_channels: int = 3) -> Tensor:
    """Return the output of `module` for two all-zero images (2, in_channels, image_size, image_size).

    The module runs in evaluation mode, without gradient, on copies of its buffers. Afterwards, the random state and the
    mode of the module are as before. The images have the device and dtype of the module's first parameter. Raises
    ValueError if the module rejects the images, or if the output is neither (2, D) nor (2, C, H, W).
    """
    check_positive(image_size=image_size, in_channels=in_channels)
    name = type(module).__name__
    first = next(module.parameters(), torch.empty(0))
    images = torch.zeros(2, in_channels, image_size, image_size, device=first.device, dtype=first.dtype)
    buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
    try:
        with evaluating(module), torch.no_grad(), unchanged_random_state(first.device):
            out = torch.func.functional_call(module, buffers, (images,))
    except Exception as error:  # code of the user can raise any exception, and timm raises AssertionError
        raise ValueError(
            f"{name} does not accept images of shape {tuple(images.shape)}: {error}; "
            "a backbone is called with one tensor (N, C, H, W), so change image_size, in_channels or the module"
        ) from error
    if not isinstance(out, Tensor):
        raise ValueError(
            f"{name} returns a {type(out).__name__}, but a backbone must return one tensor (N, D) or (N, C, H, W): "
            "wrap it in a module that returns the tensor"
        )
    if out.ndim not in (2, 4) or len(out) != len(images):
        raise ValueError(
            f"{name} returns shape {tuple(out.shape)} for images of shape {tuple(images.shape)}, "
            "but a backbone must return (N, D) or (N, C, H, W): pool or flatten its output"
        )
    return out


def pooled(out: Tensor) -> Tensor:
    """Average feature maps over height and width: (N, C, H, W) -> (N, C). Vectors (N, D) are returned unchanged."""
    return out.mean((2, 3)) if out.ndim == 4 else out


class Wrapped(Backbone):
    """Backbone around a module of the user. Parameters are named `module.*`; exports omit the prefix `module.`.

    Args:
        module: the module, from images (N, C, H, W) to vectors (N, num_features) or feature maps (N, num_features, H,
            W).
        num_features: number of features per image.
    """

    wrapped_name = "module"

    def __init__(self, module: nn.Module, *, num_features: int) -> None:
        super().__init__()
        self.module = module
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        """Return features: (N, C, H, W) -> (N, num_features). Feature maps are averaged over height and width."""
        return pooled(self.module(images))


def as_backbone(module: nn.Module, *, image_size: int, in_channels: int = 3) -> Backbone:
    """Convert `module` to a backbone for images of `image_size` pixels.

    A trial forward pass determines the number of features D. If the output is (N, D) and the attribute `num_features`
    of the module equals D, the module itself is returned, so its parameter names do not change. Feature maps of this
    backbone are available only if its class defines the method `stages`.

    Any other module is wrapped. An output (N, D) is used as features. An output (N, C, H, W) is averaged over height
    and width. Raises ValueError, with the shape in the message, if the output has another shape.

    The trial forward pass does not change the mode and the buffers of the module, or the random state.
    """
    out = dry_output(module, image_size=image_size, in_channels=in_channels)
    declared = getattr(module, "num_features", None)
    if isinstance(declared, int) and tuple(out.shape[1:]) == (declared,):
        return cast(Backbone, module)
    return Wrapped(module, num_features=out.shape[1])
