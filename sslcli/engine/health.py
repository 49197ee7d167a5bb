"""Health metrics: label-free quality metrics of representations, logged as `health/*` during training.

    feature_std               SimSiam, arXiv:2011.10566, fig. 2: 1/sqrt(d) for spread features, 0 if collapsed
    mean_norm                 SimSiam, arXiv:2011.10566, fig. 2: 0 for spread features, 1 if collapsed
    alignment, uniformity     Wang and Isola, arXiv:2005.10242, eq. 2 and 3
    rankme                    Garrido et al., arXiv:2210.02885, eq. 2 and 3
    effective_rank            Roy and Vetterli 2007 (EUSIPCO), for centered features

All metrics are pure functions of finite float32 or float64 features (N, d): N images, d dimensions. In a distributed
run, gather the features of all processes first. The mean of the metrics of single processes is not the metric of all
features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.nn.modes import full_precision


def _matrix(z: Tensor, name: str = "z") -> Tensor:
    """Validate that `z` is a floating-point (N >= 2, d) matrix. Return `z` in float32, or in float64 if it is float64.

    float32 is needed because the metrics use exp and the singular value decomposition.
    """
    if z.ndim != 2 or len(z) < 2 or not z.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(z.shape)} and dtype {z.dtype}, but features must be a floating matrix "
            "(N, d) of at least 2 rows: pass one row per image"
        )
    return full_precision(z)


def feature_std(z: Tensor, *, biased: bool = False) -> Tensor:
    """Return the standard deviation of the L2-normalized rows of `z` (N, d), averaged over dimensions, in [0, 1].

    The result is about 1/sqrt(d) if the rows are spread over the sphere, and 0 if all rows are equal. If `biased` is
    True, the sum of squares is divided by N instead of N - 1.
    """
    std: Tensor = F.normalize(_matrix(z), dim=1).std(dim=0, correction=0 if biased else 1)
    return std.mean()


def mean_norm(z: Tensor) -> Tensor:
    """Return the norm of the mean of the L2-normalized rows of `z` (N, d), in [0, 1].

    The norm is 0 if the directions of the rows cancel out, and 1 if all rows have the same direction.
    """
    norm: Tensor = torch.linalg.vector_norm(F.normalize(_matrix(z), dim=1).mean(dim=0))
    return norm


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Return the mean of |x - y|^alpha over positive pairs (Wang and Isola, eq. 2).

    A pair is row i of `z1` and row i of `z2`, both (N, d). x and y are these two rows after L2 normalization. The
    result is 0 if x = y for every pair. For alpha = 2, the result is the mean of 2 - 2 cos(x, y).
    """
    if z1.shape != z2.shape:
        raise ValueError(
            f"z1 {tuple(z1.shape)} and z2 {tuple(z2.shape)} differ in shape: pass two views of the same images"
        )
    x, y = F.normalize(_matrix(z1, "z1"), dim=1), F.normalize(_matrix(z2, "z2"), dim=1)
    return (x - y).square().sum(dim=1).pow(alpha / 2).mean()


def uniformity(z: Tensor, *, t: float = 2.0, chunk: int = 1024) -> Tensor:
    """Return log(mean of exp(-t |x_i - x_j|^2) over pairs i < j). The x_i are the L2-normalized rows of `z` (N, d).

    The result is 0 if all rows are equal, and about -2t + 2t^2/d if rows are uniform on the sphere (Wang and Isola,
    eq. 3). The function normalizes the rows and is differentiable. At most chunk x N similarities are in memory.
    """
    x = F.normalize(_matrix(z), dim=1)
    n = len(x)
    sums = []
    for start in range(0, n - 1, chunk):
        rows = x[start : start + chunk]
        exponent = -t * (2 - 2 * rows @ x[start:].T).clamp_min(0)
        # The columns are the images of the chunk and all later images. Row r and column r are the same image, so the
        # entries above the diagonal are the pairs i < j.
        below = torch.ones_like(exponent, dtype=torch.bool).tril()
        sums.append(torch.logsumexp(exponent.masked_fill(below, -math.inf).flatten(), dim=0))
    return torch.logsumexp(torch.stack(sums), dim=0) - math.log(n * (n - 1) / 2)


def rankme(z: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return exp of the entropy of the singular values of `z` (N, d): a smooth rank in [1, min(N, d)].

    `z` is not centered. With the singular values sigma, the entropy is computed for p = sigma / sum(sigma) + eps
    (RankMe, arXiv:2210.02885, eq. 2). Compare results only for equal N. The paper uses N = 25,600.
    """
    sigma = torch.linalg.svdvals(_matrix(z))
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + eps
    return torch.exp(-(p * p.log()).sum())


def effective_rank(z: Tensor) -> Tensor:
    """Return exp of the entropy of the singular values of centered `z` (N, d) (Roy and Vetterli, 2007).

    The result is in [1, min(N - 1, d)]. `rankme` differs in two points: it does not center `z`, so it includes the
    direction of the mean, and it adds a small constant eps to the normalized singular values.
    """
    z = _matrix(z)
    sigma = torch.linalg.svdvals(z - z.mean(dim=0))
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.exp(-torch.xlogy(p, p).sum())


@torch.no_grad()
def measure(z: Tensor, other: Tensor | None = None) -> dict[str, float]:
    """Return the logged metrics of a batch of embeddings `z` (N, d) as floats.

    The metrics are std, mean_norm, uniformity, rankme and effective_rank. `other` (N, d) holds the embeddings of a
    second view of the same images. If `other` is given, alignment is added. All metrics are NaN if `z` is not finite.
    The function synchronizes with the device: once for all metrics, and once in each singular value decomposition. Call
    it only in steps that are logged.
    """
    z = _matrix(z.detach())
    finite = torch.isfinite(z).all()
    z = torch.where(finite, z, 0.0)  # the singular value decomposition raises an error if a value is not finite
    values = {
        "std": feature_std(z),
        "mean_norm": mean_norm(z),
        "uniformity": uniformity(z),
        "rankme": rankme(z),
        "effective_rank": effective_rank(z),
    }
    if other is not None:
        values["alignment"] = alignment(z, other.detach())
    numbers = torch.stack([value.to(z.dtype) for value in values.values()])
    return dict(zip(values, torch.where(finite, numbers, math.nan).tolist(), strict=True))
