"""Un-Mix: each image of a batch is mixed with an image of the same batch in reverse order.

Shen et al. 2022  https://arxiv.org/abs/2003.05438   conf/mixture/unmix.yaml

The mixtures add a term to the loss of a two-view method. In this term, the loss against each of the two source images
is weighted by the fraction of this image in the mixture. The method passes functions for encoding and comparison.
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
    """Return weight x_i + (1 - weight) x_(N-1-i) for images (N, C, H, W), as in mixup."""
    return weight * images + (1 - weight) * images.flip(0)


def mix_region(images: Tensor, weight: float, center: tuple[int, int]) -> tuple[Tensor, float]:
    """Paste a box of the reversed batch into each image, as in CutMix.

    Returns the mixed images, and the area fraction of each image outside the box. The area fraction of the box is about
    1 - `weight`, or less if the box is clipped at the border; the returned fraction is that for the clipped box.
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
    """Self-mixture as an option of two-view methods.

    Each step draws one mixing weight, the same for all processes. Images are mixed only within a process, so the mixed
    pairs, and therefore the results, depend on the number of processes.

    Args:
        probability: probability of mixing whole images; otherwise a box is pasted.
        beta: the weight is drawn from Beta(beta, beta); 1 is uniform.
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
        """Return mixtures (N, C, H, W) and the fraction in [0, 1] of image i in mixture i; the rest is image N-1-i."""
        numbers = random.Random(int(torch.randint(2**62, (), generator=self.noise.shared())))
        is_global = numbers.random() < self.probability
        weight = numbers.betavariate(self.beta, self.beta)
        if is_global:
            return mix_global(images, weight), weight
        height, width = images.shape[-2:]
        return mix_region(images, weight, (numbers.randrange(height), numbers.randrange(width)))

    def forward(self, images: Tensor, query: Callable[[Tensor], Tensor], compare: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the loss of the mixtures: weight L(q(mix)) + (1 - weight) L(q(mix) in reverse order)."""
        mixed, weight = self.mix(images)
        queries = query(mixed)
        # In reverse order, mixture i contains the fraction 1 - weight of image i, so one encoding of them is enough.
        return weight * compare(queries) + (1 - weight) * compare(queries.flip(0))


def add_mixture(
    mixture: UnMix | None,
    scalars: dict[str, Tensor],
    images: Tensor,
    *,
    query: Callable[[Tensor], Tensor],
    compare: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Add the loss of mixtures of `images` to the `loss` of a step; return `scalars` unchanged if `mixture` is None.

    Args:
        mixture: the method's mixture option.
        scalars: scalars of the step on the unmixed views.
        images: (N, C, H, W), the first view.
        query: the method's query encoder: (N, C, H, W) -> (N, D).
        compare: scalar loss of queries (N, D), row i against the unmixed targets of image i.
    """
    if mixture is None:
        return scalars
    loss = mixture(images, query, compare)
    return scalars | {"loss": scalars["loss"] + loss, "mixture_loss": loss}
