"""Memory bank with one stored embedding per training image, and the losses computed from its rows.

Wu et al. 2018    https://arxiv.org/abs/1805.01978   memory_bank.py (instance discrimination)
Tian et al. 2020  https://arxiv.org/abs/1906.05849   cmc.py (one bank per modality)

Shapes: N images per process, W processes, n training images, D embedding size, K noise rows (random rows of the bank)
per image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather
from sslcli.errors import check_positive
from sslcli.nn.contrastive import check_momentum
from sslcli.nn.modes import double_precision

EPS = 1e-7  # added to the noise mass c = K / n in the denominators of `nce`, as in the official implementations
# Gathering one row of the bank takes at least as long as multiplying 8 rows in a matrix product. `scores` therefore
# multiplies with all rows if the bank has at most DENSE * (K + 1) rows.
DENSE = 8


class Bank(nn.Module):
    """Moving averages of the embeddings of all training images, identical on all processes.

    The bank is a matrix (n, D). Row i is the moving average of the embedding of training image i.

    Args:
        num_images: number of training images n.
        dim: width D of the embeddings.
        momentum: weight of the old row in an update, in [0, 1].
        empty: initialization of the rows. True: all rows are zero, and the first embedding of an image becomes its row.
            False: the values are uniform in +-sqrt(3 / D), which gives rows with a mean squared norm of 1.

    Updated rows have unit norm. Raises ValueError if an argument is out of range.
    """

    rows: Tensor  # (n, D); row i belongs to the image at position i of the training split

    def __init__(self, num_images: int, dim: int, *, momentum: float, empty: bool = False) -> None:
        super().__init__()
        check_positive(num_images=num_images, dim=dim)
        check_momentum(momentum)
        bound = 0.0 if empty else math.sqrt(3 / dim)
        self.register_buffer("rows", torch.empty(num_images, dim).uniform_(-bound, bound))
        self.momentum = momentum
        self.new: list[tuple[Tensor, Tensor, Tensor]] = []  # index, embeddings, present of this step's micro-batches

    def known(self, index: Tensor) -> Tensor:
        """Return a mask (N,): True if the bank has an embedding of the image, False if the row of the image is zero.

        `index` (N,) contains the positions of the images in the training split.
        """
        return self.rows[index].any(1)

    def remember(self, index: Tensor, embeddings: Tensor, present: Tensor | None = None) -> None:
        """Gather `index` (N,) and `embeddings` (N, D) from all processes and keep them until `update` is called.

        `index` contains the positions of the images in the training split. The embeddings must have unit norm. Images
        for which `present` (N,) is False are skipped.
        """
        index, embeddings = all_gather(index), all_gather(embeddings)
        rows = torch.ones_like(index, dtype=torch.bool) if present is None else all_gather(present)
        self.new.append((index, embeddings, rows))

    def update(self) -> None:
        """Update the rows of the bank with all embeddings that `remember` got since the previous call of `update`."""
        if self.new:
            index, embeddings, present = (torch.cat(parts) for parts in zip(*self.new, strict=True))
            write(self.rows, index, embeddings, present, momentum=self.momentum)
        self.new.clear()


@torch.no_grad()
def write(rows: Tensor, index: Tensor, embeddings: Tensor, present: Tensor | None = None, *, momentum: float) -> None:
    """Set rows[index] to normalize(momentum * rows[index] + (1 - momentum) * embeddings), in place.

    The shapes are `rows` (n, D), `index` (G,), `embeddings` (G, D) and `present` (G,) for G embeddings. Embeddings for
    which `present` is False are skipped; None = none are skipped. If an image occurs more than once in `index`, only
    its last embedding is used. The result therefore does not depend on the order of the writes.
    """
    # A boolean index would make the host wait for the number of present embeddings. Instead, the embeddings of an image
    # are sorted so that the present ones are last, and the rows of images without any are written back unchanged.
    present = torch.ones_like(index, dtype=torch.bool) if present is None else present
    ordered, places = (2 * index + present).sort(stable=True)
    last = places[torch.searchsorted(ordered, 2 * index + 1, right=True) - 1]  # (G,) last embedding of each image
    before = rows[index]
    mixed = F.normalize(before.lerp(embeddings[last].to(rows.dtype), 1 - momentum), dim=1)
    rows.index_copy_(0, index, torch.where(present[last, None], mixed, before))


def scores(query: Tensor, rows: Tensor, chosen: Tensor, *, temperature: float) -> Tensor:
    """Return logits (N, K + 1): the dot product of query[i] and rows[chosen[i, k]], divided by `temperature`.

    The shapes are `query` (N, D), `rows` (n, D) and `chosen` (N, K + 1). `chosen` contains int64 indices of rows.
    `rows` gets no gradient.
    """
    rows = rows.detach()
    if len(rows) <= DENSE * chosen.shape[1]:
        return (query @ rows.T).gather(1, chosen) / temperature
    return torch.bmm(rows[chosen], query[:, :, None]).squeeze(2) / temperature


def log_normalizer(logits: Tensor, num_images: int, present: Tensor | None = None) -> float | None:
    """Return log Z with Z = n * mean(exp(logits)) over the (N, K + 1) logits of all processes (1805.01978, eq. 8).

    Z normalizes the probabilities in `nce`. K is the number of noise rows, and n is `num_images`, the number of
    training images. Only images for which `present` (N,) is True are included; None includes all images. Returns None
    if `present` is False for all images of all processes.
    """
    rows = all_gather(double_precision(logits.detach()).logsumexp(1))  # (WN,)
    if present is not None:
        rows = rows[all_gather(present)]
    if not len(rows):
        return None
    return float(rows.logsumexp(0)) - math.log(len(rows) * logits.shape[1]) + math.log(num_images)


def nce(logits: Tensor, *, log_z: float, num_images: int) -> Tensor:
    """Return noise-contrastive estimation losses (N,), each summed over K + 1 rows (1805.01978, eq. 4 to 7).

    Column 0 of `logits` (N, K + 1) is the logit of an image with its own row of the bank. The other columns are its
    logits with K noise rows, drawn uniformly from the n rows of the bank. n is `num_images`. `log_z` is the log of the
    normalizer Z, see `log_normalizer`. The log-probabilities are log P = logits - log_z, and the noise mass is
    c = K / n. The loss is the negative sum of log(P / (P + c)) for the image's own row and log(c / (P + c)) for each
    noise row. These terms are computed from log P to avoid overflow.
    """
    noise = (logits.shape[1] - 1) / num_images
    log_p = logits - log_z
    log_total = torch.logaddexp(log_p, log_p.new_full((), math.log(noise + EPS)))
    own = log_p[:, 0] - log_total[:, 0]
    others = (math.log(noise) - log_total[:, 1:]).sum(1)
    return -(own + others)


def sampled_softmax(logits: Tensor) -> Tensor:
    """Return the cross-entropy (N,) over the columns of `logits` (N, K + 1).

    Row i contains the logits of image i with rows of the bank: column 0 with the image's own row, and the other columns
    with K noise rows. The target is column 0.
    """
    own = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, own, reduction="none")


@torch.no_grad()
def own_row_wins(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return a tensor (N,): 1 if an image has its largest logit with its own row of the bank, else 0.

    `logits` (N, K + 1) are the logits of each image with the bank rows `chosen` (N, K + 1). Column 0 of both belongs to
    the image's own row. Other columns that repeat this row are ignored.
    """
    others = logits.masked_fill(chosen == chosen[:, :1], -torch.inf)
    return (logits[:, 0] > others.amax(1)).to(logits.dtype)
