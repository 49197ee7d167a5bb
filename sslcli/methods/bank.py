"""A memory bank: one stored vector for every training image, and the losses that look rows of it up.

Wu et al. 2018    https://arxiv.org/abs/1805.01978   memory_bank.py (instance discrimination)
Tian et al. 2020  https://arxiv.org/abs/1906.05849   cmc.py (one bank a modality)

Shapes: N images a process, W processes, n training images, D embedding size, K noise rows an image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed import all_gather
from sslcli.errors import check_positive
from sslcli.losses import check_momentum

EPS = 1e-7  # added to the noise in the denominators of the official codes
DENSE = 8  # a row of the bank is read from memory in the time of so many rows of a matrix product, or more


class Bank(nn.Module):
    """Rows that follow the embeddings of the training images, the same on all processes.

    Args:
        num_images: n, rows.
        dim: D, width of a row.
        momentum: share of the old row in an update, in [0, 1].
        empty: rows start as zeros, which belong to no image yet; the first embedding of an image is then its row.

    Rows that are not empty start uniform in +-sqrt(3 / D), so that their mean squared length is 1. Updated rows have
    unit length. Raises ValueError for values outside these.
    """

    rows: Tensor  # (n, D), row i belongs to position i of the training split

    def __init__(self, num_images: int, dim: int, *, momentum: float, empty: bool = False) -> None:
        super().__init__()
        check_positive(num_images=num_images, dim=dim)
        check_momentum(momentum)
        bound = 0.0 if empty else math.sqrt(3 / dim)
        self.register_buffer("rows", torch.empty(num_images, dim).uniform_(-bound, bound))
        self.momentum = momentum
        self.new: list[tuple[Tensor, Tensor]] = []  # index and embeddings of the micro-batches of this step

    def known(self, index: Tensor) -> Tensor:
        """Which of the images `index` (N,) have a row: (N,) bool, false for those never seen by an empty bank."""
        return self.rows[index].any(1)

    def remember(self, index: Tensor, embeddings: Tensor, present: Tensor | None = None) -> None:
        """Keep what every process found for its images until `update`: index (N,) and unit rows (N, D).

        Images where `present` (N,) is false have no such embedding, and their rows stay as they are.
        """
        index, embeddings = all_gather(index), all_gather(embeddings)
        if present is not None:
            rows = all_gather(present)
            index, embeddings = index[rows], embeddings[rows]
        self.new.append((index, embeddings))

    def update(self) -> None:
        """Write everything that was remembered since the last update."""
        if self.new:
            index, embeddings = (torch.cat(parts) for parts in zip(*self.new, strict=True))
            write(self.rows, index, embeddings, momentum=self.momentum)
        self.new.clear()


@torch.no_grad()
def write(rows: Tensor, index: Tensor, embeddings: Tensor, *, momentum: float) -> None:
    """rows[index] <- unit vector of momentum * rows[index] + (1 - momentum) * embeddings, in place.

    `rows` (n, D), `index` (G,), `embeddings` (G, D). An image that comes more than once counts with its last
    embedding: all its writes are then the same, so that their order does not matter.
    """
    ordered, places = index.sort(stable=True)
    last = places[torch.searchsorted(ordered, index, right=True) - 1]  # (G,) where each image comes last
    mixed = rows[index].lerp(embeddings[last].to(rows.dtype), 1 - momentum)
    rows.index_copy_(0, index, F.normalize(mixed, dim=1))


def scores(query: Tensor, rows: Tensor, chosen: Tensor, *, temperature: float) -> Tensor:
    """query[i] . rows[chosen[i, k]] / temperature: (N, D), (n, D), (N, K + 1) -> (N, K + 1); no gradient to `rows`."""
    rows = rows.detach()
    if len(rows) <= DENSE * chosen.shape[1]:
        return (query @ rows.T).gather(1, chosen) / temperature
    return torch.bmm(rows[chosen], query[:, :, None]).squeeze(2) / temperature


def log_normalizer(logits: Tensor, num_images: int, present: Tensor | None = None) -> float | None:
    """log Z with Z = n * mean(exp(logits)) over the (N, K + 1) scores of all processes (1805.01978, eq. 8).

    Only images where `present` (N,) is true count; None where there is no such image.
    """
    rows = all_gather(logits.detach().double().logsumexp(1))  # (WN,)
    if present is not None:
        rows = rows[all_gather(present)]
    if not len(rows):
        return None
    return float(rows.logsumexp(0)) - math.log(len(rows) * logits.shape[1]) + math.log(num_images)


def nce(logits: Tensor, *, log_z: float, num_images: int) -> Tensor:
    """Noise-contrastive estimation (1805.01978, eq. 4 to 7): (N,) losses, each the sum over an image's K + 1 rows.

    `logits` (N, K + 1), the image's own row first, the others drawn uniformly from all n. `log_z` turns scores into
    log-probabilities. With noise mass c = K / n the terms are log(P / (P + c)) for the own row and log(c / (P + c))
    for the others, computed from log P so that no score overflows.
    """
    noise = (logits.shape[1] - 1) / num_images
    log_p = logits - log_z
    log_total = torch.logaddexp(log_p, log_p.new_tensor(math.log(noise + EPS)))
    own = log_p[:, 0] - log_total[:, 0]
    others = (math.log(noise) - log_total[:, 1:]).sum(1)
    return -(own + others)


def sampled_softmax(logits: Tensor) -> Tensor:
    """(N,) cross-entropy of the own row, column 0, among the K + 1 of `logits` (N, K + 1)."""
    own = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, own, reduction="none")


@torch.no_grad()
def own_row_wins(logits: Tensor, chosen: Tensor) -> Tensor:
    """(N,) 1 where the own row, column 0, scores above all other images' rows among `chosen` (N, K + 1), else 0."""
    others = logits.masked_fill(chosen == chosen[:, :1], -torch.inf)
    return (logits[:, 0] > others.amax(1)).to(logits.dtype)
