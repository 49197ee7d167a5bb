"""Projection and prediction heads: stacks of linear layers with BatchNorm and ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(
    widths: Sequence[int],
    *,
    norm: bool = True,
    bias: bool = False,
    last_norm: str | None = None,
    last_bias: bool = False,
) -> nn.Sequential:
    """Build linear layers with ReLU in between.

    Args:
        widths: input width, then the output width of each linear layer.
        norm: add BatchNorm before each ReLU.
        bias: add a bias to each linear layer except the last.
        last_norm: BatchNorm after the last layer: None, "affine", "scale" (without beta, as in SimCLR) or "plain"
            (without gamma and beta, as in MoCo v3).
        last_bias: add a bias to the last linear layer.

    Raises ValueError if there are fewer than two widths, a width is below 1, or `last_norm` has another value.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"a head needs at least an input and an output width, all positive, but got {list(widths)}")
    layers: list[nn.Module] = []
    for width, following in pairwise(widths[:-1]):
        layers += [nn.Linear(width, following, bias=bias), *([nn.BatchNorm1d(following)] if norm else []), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm is not None:
        if last_norm not in ("affine", "scale", "plain"):
            raise ValueError(f"last_norm is {last_norm!r}, but it must be affine, scale, plain or None")
        norm_layer = nn.BatchNorm1d(widths[-1], affine=last_norm != "plain")
        if last_norm == "scale":
            norm_layer.register_parameter("bias", None)
        layers.append(norm_layer)
    return nn.Sequential(*layers)
