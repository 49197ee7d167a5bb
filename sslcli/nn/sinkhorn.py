"""Sinkhorn-Knopp: assignments of images to prototypes that use all prototypes equally often.

Cuturi 2013  https://arxiv.org/abs/1306.0895; used by SwAV, DINOv2 and MSN.

Shapes: N images per process, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslcli.distributed.collectives import all_gather

FLOOR = -1e30  # instead of minus infinity, the logarithm of the sum of a column in which no row counts


@torch.no_grad()
def sinkhorn(
    logits: Tensor, *, temperature: float | Tensor, iterations: int = 3, counted: Tensor | None = None
) -> Tensor:
    """Return the assignment probabilities (N, K) of the rows of `logits` (N, K), in float32 or float64.

    `counted` (N,) bool: only the rows with True count in the sums of the columns. None = all rows. If no row of any
    process counts, the result has no meaning, but is finite.

    Starting from exp(logits / temperature), each iteration scales the columns to equal sums over the images of all
    processes, and then the rows to the sum 1. With few iterations, the columns are only nearly equal; the rows always
    sum to 1. N may differ between processes and may be 0.

    The computation is in the log domain, so that no `logits` overflow, also with fp16 and a low temperature. Each
    iteration has one collective, of K numbers per process.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    for _ in range(iterations):
        rows = scores if counted is None else scores.masked_fill(~counted[:, None], -torch.inf)
        of_process = torch.logsumexp(rows, dim=0, keepdim=True)  # (1, K)
        scores = scores - torch.logsumexp(all_gather(of_process), dim=0).clamp(min=FLOOR)
        scores = scores - torch.logsumexp(scores, dim=1, keepdim=True)
    return scores.exp()
