"""Context networks of CPC. The context in row i of the grid summarizes the patches of rows 0 (top) to i.

v1     van den Oord, Li, Vinyals 2018  https://arxiv.org/abs/1807.03748
v2     Henaff et al. 2020              https://arxiv.org/abs/1905.09272
gated  van den Oord et al. 2016        https://arxiv.org/abs/1606.05328

Each network maps encodings (N, D, g, g) of N images with g x g patches to contexts (N, out_channels, g, g). Row i of
the contexts depends only on the rows 0 to i of the encodings. No network has a normalization layer, so the contexts of
an image do not depend on other images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATED_LAYERS = 4  # as in the code of GreedyInfoMax (vision/models)
RESIDUAL_BLOCKS = 5  # CPC v2, appendix


class Context(nn.Module):
    """Base class of context networks, which map encodings (N, D, g, g) to contexts (N, out_channels, g, g).

    Each of the N images is divided into g x g patches. D is the size of the encoding of a patch.
    """

    out_channels: int


class GruContext(Context):
    """Context network: a GRU over each column of the grid, from top to bottom."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, hidden, batch_first=True)
        self.out_channels = hidden

    def forward(self, z: Tensor) -> Tensor:
        """Return contexts: (N, D, g, g) -> (N, hidden, g, g)."""
        num_images, dim, rows, columns = z.shape
        sequences = z.permute(0, 3, 2, 1).reshape(num_images * columns, rows, dim)
        states, _ = self.gru(sequences)
        return states.view(num_images, columns, rows, -1).permute(0, 3, 2, 1)  # type: ignore[no-any-return]


class GatedLayer(nn.Module):
    """Gated convolution: tanh(a) * sigmoid(b), where a and b are the two halves of a convolution's output channels.

    The convolution covers two rows (the current row and the row above it) and three columns. A 3x3 convolution whose
    last row is masked gives the same result, but needs 50 % more arithmetic.
    """

    def __init__(self, in_channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 2 * hidden, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(F.pad(x, (1, 1, 1, 0))).chunk(2, dim=1)
        return torch.tanh(value) * torch.sigmoid(gate)


class GatedContext(Context):
    """Context network: four gated layers and a 1x1 convolution.

    All gated layers except the first have a residual connection.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.first = GatedLayer(dim, hidden)
        self.others = nn.ModuleList(GatedLayer(hidden, hidden) for _ in range(GATED_LAYERS - 1))
        self.last = nn.Conv2d(hidden, hidden, 1)
        self.out_channels = hidden

    def forward(self, z: Tensor) -> Tensor:
        """Return contexts: (N, D, g, g) -> (N, hidden, g, g)."""
        x = self.first(z)
        for layer in self.others:
            x = x + layer(x)
        return self.last(x)  # type: ignore[no-any-return]


class ResidualContext(Context):
    """Context network: five residual blocks and a ReLU (CPC v2, appendix).

    The network computes a context for each patch of a grid. The context depends only on patches in the same row and in
    the rows above. Each block covers two rows (the current row and the row above it) and three columns.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(residual_block(dim, hidden) for _ in range(RESIDUAL_BLOCKS))
        self.out_channels = dim

    def forward(self, z: Tensor) -> Tensor:
        """Return contexts: (N, D, g, g) -> (N, D, g, g)."""
        for block in self.blocks:
            z = z + block(z)
        return F.relu(z)


def residual_block(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
        nn.ZeroPad2d((0, 0, 1, 0)),
        nn.Conv2d(hidden, hidden, (2, 1)),
        nn.ReLU(),
        nn.Conv2d(hidden, dim, 1),
    )


CONTEXTS: dict[str, Callable[[int, int], Context]] = {
    "gru": GruContext,
    "pixelcnn_gated": GatedContext,
    "pixelcnn_v2": ResidualContext,
}


def context_network(context: str, dim: int, hidden: int) -> Context:
    """Build the context network named `context`, for `dim` input channels and `hidden` hidden channels.

    Raises ValueError if `context` is not a key of CONTEXTS.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context is {context!r}, but it must be one of: {', '.join(CONTEXTS)}")
    return CONTEXTS[context](dim, hidden)
