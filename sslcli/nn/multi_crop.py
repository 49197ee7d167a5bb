"""Forward pass of views of several sizes (multi-crop), as in SwAV and DINO.

Shapes: V views, N images per process, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


def forward_by_size(backbone: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Return the features (V * N, D) of all views, in the order of the views. `views` are (N, C, H, W) tensors.

    Consecutive views of one size are concatenated, so that there is one call of the backbone per size. A projection
    head then needs a single call for all views. BatchNorm statistics in the backbone are computed over the views of
    one size. Without BatchNorm, the result equals that of a call per view.
    """
    sizes = groupby(views, key=lambda view: view.shape[2:])
    return torch.cat([backbone(torch.cat(list(group))) for _, group in sizes])
