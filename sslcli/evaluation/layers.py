"""Feature layers of a network: backbone output, projection, a layer of the projection head, or a backbone stage.

backbone     `features` of a method, or the output of a backbone without a method
projection   the input of the method's loss
bank         rows of the method's memory bank (`stored`) for training images, the projection for other images
head1, ...   a layer of the projection head, only for methods with `head_features`
layer3, ...  a stage of the backbone, averaged over height and width
layer3-tokens, ...  the same feature map without averaging: its P positions as tokens with D channels, (N, P * D)
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from sslcli.backbones.wrap import pooled
from sslcli.errors import nearest
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating

BACKBONE = "backbone"
BANK = "bank"
TOKENS = "-tokens"  # suffix of the layers that contain all positions of a feature map


def names(net: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the feature layers of a network. `images` (N, C, H, W) is an example input."""
    found = [BACKBONE]
    if isinstance(net, Method):
        found += ["projection"] if type(net).projection is not Method.projection else []
        found += [BANK] if net.stored() is not None else []
        found += [f"head{number + 1}" for number in range(net.head_layers)]
    return found + list(maps(net, images))


def maps(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the feature maps of the backbone by stage, name -> (N, D, rows, columns), or {} if it has no stages.

    The network runs in evaluation mode, without gradient. `images` (N, C, H, W) is an example input.
    """
    try:
        with evaluating(net), torch.no_grad():
            return _stages(net, images)
    except (AttributeError, ValueError):  # the backbone has no stages
        return {}


def check(net: nn.Module, layer: str, images: Tensor) -> None:
    """Raise ValueError unless the network has the layer. The message lists the available layers.

    `images` (N, C, H, W) is an example input of the network.
    """
    known = names(net, images)
    if layer not in known and layer.removesuffix(TOKENS) not in maps(net, images):
        raise ValueError(
            f"feature_layer is {layer!r}, which this net does not have.{nearest(layer, known)} "
            f"It has: {', '.join(known)}"
        )


def read(net: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Return the features (N, d) of images (N, C, H, W) at an existing layer.

    For the layer `bank`, the projection is returned for all images. `features.from_bank` then replaces the features of
    training images by rows of the memory bank.
    """
    if layer == BACKBONE:
        found: Tensor = net.features(images) if isinstance(net, Method) else net(images)
    elif layer in ("projection", BANK) and isinstance(net, Method):
        found = net.projection(images)
    elif (inside := re.fullmatch(r"head(\d+)", layer)) and isinstance(net, Method):
        found = net.head_features(images, int(inside[1]))
    elif layer.endswith(TOKENS):
        found = _stages(net, images)[layer.removesuffix(TOKENS)].flatten(2).transpose(1, 2).flatten(1)
    else:
        found = pooled(_stages(net, images)[layer])
    return found


def _stages(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    backbone = net.evaluated_network if isinstance(net, Method) else net
    return backbone.stages(images)  # type: ignore[operator, no-any-return]
