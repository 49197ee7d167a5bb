"""Spherical k-means of rows that all processes hold, with the work divided between the processes.

Caron et al. 2020  https://arxiv.org/abs/2006.09882, cluster_memory in swav/main_deepclusterv2.py

Shapes: n rows, D width of a row, K clusters, W processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.distributed.collectives import all_gather, all_reduce_mean, rank, world_size

BLOCK = 1 << 24  # similarities that are computed together; they need 64 MB in float32


@torch.no_grad()
def spherical_kmeans(rows: Tensor, used: Tensor, centroids: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Return centroids (K, D) of length 1, and the cluster (n,) of each row.

    Each iteration assigns the rows to the centroid with the largest dot product, and replaces a centroid by the
    normalized sum of its rows. A centroid without rows does not change. The returned clusters belong to the returned
    centroids. All processes must have the same arguments; each of them assigns an equal part of the rows.

    Args:
        rows: (n, D), of length 1.
        used: (n,) bool. A row for which it is False is assigned, but has no influence on the centroids.
        centroids: (K, D), the centroids before the first iteration. They are not modified.
        iterations: number of iterations, at least 0.
    """
    share = -(-len(rows) // world_size())
    mine = slice(rank() * share, (rank() + 1) * share)
    for _ in range(iterations):
        centroids = _updated(rows[mine], used[mine], centroids)
    clusters = rows.new_zeros(share, dtype=torch.long)
    found = nearest(rows[mine], centroids)
    clusters[: len(found)] = found
    return centroids, all_gather(clusters)[: len(rows)]


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """Return the index (n,) of the centroid with the largest dot product for each of `rows` (n, D)."""
    blocks = torch.split(rows, max(1, BLOCK // len(centroids)))
    return torch.cat([(block @ centroids.T).argmax(1) for block in blocks])


def _updated(rows: Tensor, used: Tensor, centroids: Tensor) -> Tensor:
    """Return the centroids after one iteration. `rows` and `used` are the part of this process."""
    clusters, weights = nearest(rows, centroids), used.to(rows.dtype)
    sums = torch.zeros_like(centroids).index_add_(0, clusters, rows * weights[:, None])
    counts = weights.new_zeros(len(centroids)).index_add_(0, clusters, weights)
    members = all_reduce_mean(counts)[:, None] > 0
    return torch.where(members, F.normalize(all_reduce_mean(sums), dim=1), centroids)
