"""Summary of the assignments of images to prototypes, for the collapse detection.

Caron et al. 2021, section 5.3, https://arxiv.org/abs/2104.14294: the assignments have collapsed if all images have the
same one, be it one prototype or all prototypes equally.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Assignments(NamedTuple):
    """Mean probabilities (K,) of K prototypes over the images of a batch, and the mean entropy of an image (scalar)."""

    mean: Tensor
    entropy: Tensor

    def information(self) -> Tensor:
        """Return how much the assignment of an image differs from the mean assignment, in nats, in [0, log K].

        This is the mean Kullback-Leibler divergence of the assignments from their mean, which equals the entropy of the
        mean minus the mean entropy. It is 0 if all images have the same assignment.
        """
        of_mean: Tensor = torch.special.entr(self.mean).sum()
        return of_mean - self.entropy


def summarize(probabilities: Tensor) -> Assignments:
    """Return the summary of `probabilities` (..., K), in which each row is the assignment of one image."""
    rows = probabilities.detach().flatten(0, -2)
    return Assignments(rows.mean(0), torch.special.entr(rows).sum(1).mean())
