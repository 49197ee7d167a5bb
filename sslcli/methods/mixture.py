"""Un-Mix: image i of a batch of N images is mixed with image N-1-i.

Shen et al. 2022  https://arxiv.org/abs/2003.05438   conf/mixture/unmix.yaml

The mixtures add a term to the loss of a two-view method. A mixture is compared with each of its two source images, and
each of the two losses is weighted by the fraction of the source image in the mixture. The two-view method calls
`add_mixture` with its own functions for encoding and comparing images.

Shapes: N images per process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sslcli.nn.noise import Noise


def mix_global(images: Tensor, weight: float) -> Tensor:
    """Mix whole images as in mixup: return weight * x_i + (1 - weight) * x_(N-1-i) for x = `images` (N, C, H, W)."""
    return weight * images + (1 - weight) * images.flip(0)


def mix_region(images: Tensor, weight: float, center: tuple[int, int]) -> tuple[Tensor, float]:
    """Paste a box of image N-1-i into image i, as in CutMix, for `images` (N, C, H, W).

    Returns the mixed images, and the fraction of the area that still shows image i. The box has about the fraction
    1 - `weight` of the area, and its center is `center` (row, column). If the box extends beyond the image border, it
    is clipped. The returned fraction is computed from the clipped box.
    """
    height, width = images.shape[-2:]
    top, bottom = _span(height, weight, center[0])
    left, right = _span(width, weight, center[1])
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span(side: int, weight: float, center: int) -> tuple[int, int]:
    half = int(side * math.sqrt(1 - weight)) // 2
    return max(center - half, 0), min(center + half, side)


class UnMix(nn.Module):
    """Option of two-view methods: mix the images of a batch with each other.

    Each step draws one mixing weight, which is the same for all processes. Images are mixed only with images of the
    same process. The mixed pairs, and therefore the results, depend on the number of processes.

    Args:
        probability: probability that a step mixes whole images (`mix_global`). In all other steps, a box of one image
            is pasted into the other (`mix_region`).
        beta: the mixing weight is drawn from the distribution Beta(beta, beta). With 1, this distribution is uniform.
    """

    def __init__(self, *, probability: float = 0.5, beta: float = 1.0) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}, but it must lie in [0, 1]")
        if not beta > 0:
            raise ValueError(f"beta is {beta}, but a beta distribution needs a positive one; 1 is uniform")
        self.probability = probability
        self.beta = beta
        self.noise = Noise()

    def mix(self, images: Tensor) -> tuple[Tensor, float]:
        """Return mixtures (N, C, H, W) of images i and N-1-i, and the fraction of image i in mixture i, in [0, 1]."""
        numbers = random.Random(int(torch.randint(2**62, (), generator=self.noise.shared())))
        is_global = numbers.random() < self.probability
        weight = numbers.betavariate(self.beta, self.beta)
        if is_global:
            return mix_global(images, weight), weight
        height, width = images.shape[-2:]
        return mix_region(images, weight, (numbers.randrange(height), numbers.randrange(width)))

    def forward(self, images: Tensor, query: Callable[[Tensor], Tensor], compare: Callable[[Tensor], Tensor]) -> Tensor:
        """Return weight * L(q) + (1 - weight) * L(q in reverse order).

        Mixture i of a batch of N images consists of image i, with the fraction weight, and image N-1-i, with the
        fraction 1 - weight. q are the queries of the mixtures, computed by `query`. L is the loss `compare`, which
        compares query i with the targets of image i. In reverse order, query i is the query of mixture N-1-i, which
        contains image i with the fraction 1 - weight. See `add_mixture` for the arguments.
        """
        mixed, weight = self.mix(images)
        queries = query(mixed)
        # In reverse order, mixture i contains the fraction 1 - weight of image i. Encoding the mixtures once is enough.
        return weight * compare(queries) + (1 - weight) * compare(queries.flip(0))


def add_mixture(
    mixture: UnMix | None,
    scalars: dict[str, Tensor],
    images: Tensor,
    *,
    query: Callable[[Tensor], Tensor],
    compare: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Compute the loss of mixtures of `images`. Return `scalars` with this loss added to the value of "loss".

    The result also contains the loss of the mixtures alone as "mixture_loss". If `mixture` is None, `scalars` is
    returned unchanged.

    Args:
        mixture: the method's mixture option.
        scalars: scalars of the step for the unmixed views.
        images: (N, C, H, W), the first view.
        query: the method's query encoder: (N, C, H, W) -> (N, D).
        compare: function that returns the scalar loss of queries (N, D). It compares query i with the same targets as
            the query of the unmixed image i. In MoCo, these are the keys.
    """
    if mixture is None:
        return scalars
    loss = mixture(images, query, compare)
    return scalars | {"loss": scalars["loss"] + loss, "mixture_loss": loss}
