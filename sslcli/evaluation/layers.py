"""Feature layers of a network: backbone output, projection, a layer of the projection head, or a backbone stage.

backbone     `features` of a method, or the output of a backbone without a method
projection   the input of the method's loss
bank         rows of the method's memory bank (`stored`) for training images, the projection for other images
head1, ...   a layer of the projection head, only for methods with `head_features`
layer3, ...  a stage of the backbone, averaged over height and width
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


def names(net: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the feature layers of a network. `images` (N, C, H, W) is an example input."""
    found = [BACKBONE]
    if isinstance(net, Method):
        found += ["projection"] if type(net).projection is not Method.projection else []
        found += [BANK] if net.stored() is not None else []
        found += [f"head{number + 1}" for number in range(net.head_layers)]
    try:
        with evaluating(net), torch.no_grad():
            found += list(_stages(net, images))
    except (AttributeError, ValueError):  # the backbone has no stages
        pass
    return found


def check(net: nn.Module, layer: str, images: Tensor) -> None:
    """Raise ValueError unless the network has the layer. The message lists the available layers.

    `images` (N, C, H, W) is an example input of the network.
    """
    known = names(net, images)
    if layer not in known:
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
    else:
        found = pooled(_stages(net, images)[layer])
    return found


def _stages(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    backbone = net.evaluated_network if isinstance(net, Method) else net
    return backbone.stages(images)  # type: ignore[operator, no-any-return]
