"""Queues of embeddings: fixed numbers of rows, of which the oldest are overwritten first."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def enqueue(queue: Tensor, head: Tensor, keys: Tensor) -> None:
    """Overwrite the oldest rows of `queue` (K, D) with `keys` (G, D) and advance `head`. Both change in place.

    `head` is a scalar tensor, the index of the next row to overwrite. The number of keys G may be larger than the queue
    length K. In this case, only the last K keys are kept.
    """
    size = len(queue)
    rows = (head + torch.arange(len(keys), device=queue.device)) % size
    queue[rows[-size:]] = keys[-size:].to(queue.dtype)
    head.copy_((head + len(keys)) % size)


def enqueue_all(queue: Tensor, head: Tensor, keys: list[Tensor]) -> None:
    """Call `enqueue` for the keys of each micro-batch of a step, and remove them from the list `keys`."""
    for part in keys:
        enqueue(queue, head, part)
    keys.clear()
