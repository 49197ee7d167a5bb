"""Un-Mix: mixtures of a batch with itself in reverse order, as similar to each of their sources as its share.

Shen et al. 2022  https://arxiv.org/abs/2003.05438   conf/mixture/unmix.yaml

It adds a term to the loss of a method with two views; the method says how it encodes and compares. Shapes: N images a
process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sslcli.noise import Noise


def mix_global(images: Tensor, weight: float) -> Tensor:
    """weight x_i + (1 - weight) x_(N-1-i) for images (N, C, H, W), as mixup."""
    return weight * images + (1 - weight) * images.flip(0)


def mix_region(images: Tensor, weight: float, centre: tuple[int, int]) -> tuple[Tensor, float]:
    """Images with a box of those in reverse order pasted in, as CutMix, and the share that they kept.

    The box has about 1 - `weight` of the area, and less where the border cuts it off, so the share is counted anew.
    """
    height, width = images.shape[-2:]
    top, bottom = _span(height, weight, centre[0])
    left, right = _span(width, weight, centre[1])
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span(side: int, weight: float, centre: int) -> tuple[int, int]:
    half = int(side * math.sqrt(1 - weight)) // 2
    return max(centre - half, 0), min(centre + half, side)


class UnMix(nn.Module):
    """Self-mixture as an option of a method with two views.

    One weight a step, the same on all processes. An image is mixed with one of its own process, so several processes
    mix other pairs than one does, and with mixtures they do not train like one to the last digit.

    Args:
        probability: of mixing whole images; otherwise a box is pasted.
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
        """Mixtures (N, C, H, W) and the share in [0, 1] that image i has of mixture i; the rest is image N-1-i."""
        numbers = random.Random(int(torch.randint(2**62, (), generator=self.noise.shared())))
        is_global = numbers.random() < self.probability
        weight = numbers.betavariate(self.beta, self.beta)
        if is_global:
            return mix_global(images, weight), weight
        height, width = images.shape[-2:]
        return mix_region(images, weight, (numbers.randrange(height), numbers.randrange(width)))

    def forward(self, images: Tensor, query: Callable[[Tensor], Tensor], compare: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of mixtures: weight L(q(mix)) + (1 - weight) L(q(mix) in reverse order)."""
        mixed, weight = self.mix(images)
        queries = query(mixed)
        # Row i of the reversed mixtures holds 1 - weight of image i: one encoding serves both orders.
        return weight * compare(queries) + (1 - weight) * compare(queries.flip(0))


def add_mixture(
    mixture: UnMix | None,
    scalars: dict[str, Tensor],
    images: Tensor,
    *,
    query: Callable[[Tensor], Tensor],
    compare: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The scalars of a step with the loss of mixtures of `images` added to `loss`; as they are without a mixture.

    Args:
        mixture: the option of the method.
        scalars: what the step of the clean views gives.
        images: (N, C, H, W), the first view.
        query: what the method encodes queries with: (N, C, H, W) -> (N, D).
        compare: the loss () of queries (N, D), row i against the clean targets of image i.
    """
    if mixture is None:
        return scalars
    loss = mixture(images, query, compare)
    return scalars | {"loss": scalars["loss"] + loss, "mixture_loss": loss}
