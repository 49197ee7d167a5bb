"""Where in a net features are taken: the output of the backbone, the projection, a layer of the head, a stage.

backbone     what the method calls its features; of a bare backbone its output
projection   what the loss of the method sees
bank         the same, but of a training image what the method's memory bank holds of it (`stored`)
head1, ...   inside the projection head, where a method lets one in (`head_features`)
layer3, ...  a stage of the backbone, the mean over positions
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from sslcli.backbones.wrap import pooled
from sslcli.errors import nearest
from sslcli.methods.base import Method
from sslcli.nn import evaluating

BACKBONE = "backbone"
BANK = "bank"


def names(net: nn.Module, images: Tensor) -> list[str]:
    """The layers of a net that takes `images` (N, C, H, W)."""
    found = [BACKBONE]
    if isinstance(net, Method):
        found += ["projection"] if type(net).projection is not Method.projection else []
        found += [BANK] if net.stored() is not None else []
        found += [f"head{number + 1}" for number in range(net.head_layers)]
    try:
        with evaluating(net), torch.no_grad():
            found += list(_stages(net, images))
    except (AttributeError, ValueError):  # a backbone need not have stages
        pass
    return found


def check(net: nn.Module, layer: str, images: Tensor) -> None:
    """Raise ValueError, naming what there is, unless the net has the layer."""
    known = names(net, images)
    if layer not in known:
        raise ValueError(
            f"feature_layer is {layer!r}, which this net does not have.{nearest(layer, known)} "
            f"It has: {', '.join(known)}"
        )


def read(net: nn.Module, layer: str, images: Tensor) -> Tensor:
    """The features (N, d) of images (N, C, H, W) at a layer the net has; `bank` looks for none of them in the bank."""
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
    backbone = net.backbone if isinstance(net, Method) else net
    return backbone.stages(images)  # type: ignore[operator, no-any-return]
