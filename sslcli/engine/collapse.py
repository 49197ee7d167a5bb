"""Label-free quality metrics of representations, and detection of representation collapse.

    feature_std, mean_norm    SimSiam, arXiv:2011.10566, fig. 2: 1/sqrt(d) and 0 when spread, 0 and 1 when collapsed
    alignment, uniformity     Wang and Isola, arXiv:2005.10242, eq. 2 and 3
    rankme                    Garrido et al., arXiv:2210.02885, eq. 2 and 3
    effective_rank            Roy and Vetterli 2007 (EUSIPCO), of centered features

All are pure functions of finite float32 or float64 features. N images, d dimensions. In a distributed
run, gather the features first: no metric is the mean of its values on shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.nn.modes import full_precision

_REMEDY = {
    "point": (
        "The embeddings of all images shrink to one point. Likely causes: no predictor, or a target with EMA "
        "momentum 0 (it equals the online net); no BatchNorm in the heads; too high a learning rate. Restore "
        "them as in the paper's recipe, or divide the learning rate by 3 and lengthen the warm-up."
    ),
    "crowd": (
        "The embeddings crowd into a small part of the sphere. Likely causes: no negatives or too few of them; too "
        "high a temperature, momentum or learning rate; a missing predictor or BatchNorm in the heads. Check "
        "these against the paper's recipe, first the temperature and the learning rate."
    ),
    "rank": (
        "The embeddings keep only a few directions (dimensional collapse). Likely causes: too high a learning rate or "
        "weight decay; augmentations so strong that views share little; a decorrelation or centering term with "
        "too small a weight. Lower the learning rate, then weaken the augmentations."
    ),
}


def _matrix(z: Tensor, name: str = "z") -> Tensor:
    """Validate that `z` is a floating-point (N >= 2, d) matrix; return it in at least float32, for exp and SVD."""
    if z.ndim != 2 or len(z) < 2 or not z.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(z.shape)} and dtype {z.dtype}, but features must be a floating matrix "
            "(N, d) of at least 2 rows: pass one row per image"
        )
    return full_precision(z)


def feature_std(z: Tensor, *, biased: bool = False) -> Tensor:
    """Return the mean over dimensions of the standard deviation of the L2-normalized rows of `z` (N, d), in [0, 1].

    About 1/sqrt(d) if the rows are spread over the sphere, 0 if they are a single point. `biased` divides by N instead
    of N - 1.
    """
    std: Tensor = F.normalize(_matrix(z), dim=1).std(dim=0, correction=0 if biased else 1)
    return std.mean()


def mean_norm(z: Tensor) -> Tensor:
    """Return the norm of the mean L2-normalized row of `z` (N, d): 0 for a centered cloud, 1 for a single point."""
    norm: Tensor = torch.linalg.vector_norm(F.normalize(_matrix(z), dim=1).mean(dim=0))
    return norm


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Return the mean of |x - y|^alpha over positive pairs, the rows of `z1` and `z2` (N, d), normalized here.

    0 if the views of each image coincide; the mean of 2 - 2 cos for alpha 2 (Wang and Isola, eq. 2).
    """
    if z1.shape != z2.shape:
        raise ValueError(
            f"z1 {tuple(z1.shape)} and z2 {tuple(z2.shape)} differ in shape: pass two views of the same images"
        )
    x, y = F.normalize(_matrix(z1, "z1"), dim=1), F.normalize(_matrix(z2, "z2"), dim=1)
    return (x - y).square().sum(dim=1).pow(alpha / 2).mean()


def uniformity(z: Tensor, *, t: float = 2.0, chunk: int = 1024) -> Tensor:
    """Return the log of the mean over pairs i < j of exp(-t |x_i - x_j|^2), with rows of `z` (N, d) normalized here.

    0 if collapsed, about -2t + 2t^2/d if uniform on the sphere (Wang and Isola, eq. 3). Differentiable; at most
    chunk x N similarities in memory at once.
    """
    x = F.normalize(_matrix(z), dim=1)
    n = len(x)
    sums = []
    for start in range(0, n - 1, chunk):
        rows = x[start : start + chunk]
        exponent = -t * (2 - 2 * rows @ x[start:].T).clamp_min(0)
        # Row r of the chunk is column r of the remaining images; pairs i < j are the strict upper triangle.
        below = torch.ones_like(exponent, dtype=torch.bool).tril()
        sums.append(torch.logsumexp(exponent.masked_fill(below, -math.inf).flatten(), dim=0))
    return torch.logsumexp(torch.stack(sums), dim=0) - math.log(n * (n - 1) / 2)


def rankme(z: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return exp of the entropy of the singular values of `z` (N, d), not centered: a smooth rank in [1, min(N, d)].

    p = sigma / sum(sigma) + eps (Garrido et al., eq. 2). Values are comparable only for the same N; the paper uses
    25,600.
    """
    sigma = torch.linalg.svdvals(_matrix(z))
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + eps
    return torch.exp(-(p * p.log()).sum())


def effective_rank(z: Tensor) -> Tensor:
    """Return exp of the entropy of the singular values of centered `z` (N, d), without eps (Roy and Vetterli, 2007).

    Unlike `rankme`, it does not count the common mean as a direction. Scalar in [1, min(N - 1, d)].
    """
    z = _matrix(z)
    sigma = torch.linalg.svdvals(z - z.mean(dim=0))
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.exp(-torch.xlogy(p, p).sum())


@torch.no_grad()
def measure(z: Tensor, other: Tensor | None = None) -> dict[str, float]:
    """Return the logged metrics of a batch of embeddings `z` (N, d) as floats.

    These are std, mean_norm, uniformity, rankme and effective_rank. With `other` (N, d), the second view of the same
    images, also alignment. All are NaN if `z` is not finite. Synchronizes with the device; call it only in steps that
    are logged.
    """
    z = _matrix(z.detach())
    if not bool(torch.isfinite(z).all()):
        names = ["std", "mean_norm", "uniformity", "rankme", "effective_rank"]
        return dict.fromkeys(names + (["alignment"] if other is not None else []), math.nan)
    values = {
        "std": float(feature_std(z)),
        "mean_norm": float(mean_norm(z)),
        "uniformity": float(uniformity(z)),
        "rankme": float(rankme(z)),
        "effective_rank": float(effective_rank(z)),
    }
    if other is not None:
        values["alignment"] = float(alignment(z, other.detach()))
    return values


class CollapseDetector:
    """Detector of representation collapse from the metrics of the embeddings.

    Call `update` at the first step, for the values of the random initialization, then at fixed intervals: alarms
    compare with the peak so far, and a severe collapse can be complete after 50 steps. An alarm fires if a metric is
    low *and* far below its peak. A low value alone also occurs in healthy networks without BatchNorm, whose embeddings
    nearly coincide in early training.

        std         < 0.2 / sqrt(d)                        and < half its largest value so far
        uniformity  > -0.5                                 and |.| < a quarter of its largest (a squared distance)
        rankme      < 10 % of its largest value so far     and < 5 (ten tight classes are not a collapse)
        std         < 0.02 / sqrt(d) in `patience` consecutive measurements, whatever its peak

    Collapse is reported after more than `grace` measurements and two consecutive alarms, because a single batch is not
    reliable. `state_dict` contains the complete state; a resumed run gives the same results as an uninterrupted one.
    """

    def __init__(self, *, grace: int = 2, patience: int = 10) -> None:
        if grace < 1 or patience < 1:
            raise ValueError(f"grace={grace} and patience={patience} must be at least 1 measurement")
        self.grace = grace
        self.patience = patience
        self._state = {"seen": 0.0, "alarms": 0.0, "stuck": 0.0, "std": 0.0, "spread": 0.0, "rankme": 0.0}

    def update(self, values: Mapping[str, float], *, dim: int) -> str | None:
        """Add the output of `measure` for embeddings of width `dim`; return an explanation on collapse, else None.

        Measurements with a non-finite value are ignored, because they are a different failure.
        """
        std, spread, rank = values["std"], -values["uniformity"], values["rankme"]
        if not all(math.isfinite(v) for v in (std, spread, rank)):
            return None
        state = self._state
        state["seen"] += 1
        for name, value in (("std", std), ("spread", spread), ("rankme", rank)):
            state[name] = max(state[name], value)
        state["stuck"] = state["stuck"] + 1 if std * math.sqrt(dim) < 0.02 else 0.0
        verdict = self._alarm(std, spread, rank, dim)
        if state["seen"] <= self.grace or verdict is None:
            state["alarms"] = 0.0
            return None
        state["alarms"] += 1
        return verdict if state["alarms"] >= 2 else None

    def _alarm(self, std: float, spread: float, rank: float, dim: int) -> str | None:
        """Return the alarm message of one measurement, given the peaks so far, or None."""
        peak = self._state
        limit = 0.2 / math.sqrt(dim)
        if (std < limit and std < 0.5 * peak["std"]) or peak["stuck"] >= self.patience:
            found = f"std of the normalized embeddings is {std:.2g}, below {limit:.2g} = 0.2/sqrt({dim})"
            return f"{found}. {_REMEDY['point']}"
        if spread < 0.5 and spread < 0.25 * peak["spread"]:
            return f"uniformity is {-spread:.2g}, above -0.5 (its best was {-peak['spread']:.2g}). {_REMEDY['crowd']}"
        if rank < 5 and rank < 0.1 * peak["rankme"]:
            return f"RankMe is {rank:.3g}, below 10 % of its maximum {peak['rankme']:.3g}. {_REMEDY['rank']}"
        return None

    def state_dict(self) -> dict[str, float]:
        """Return peaks and counters as floats."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a `state_dict`. Raises ValueError if its keys are not those of this version."""
        if set(state) != set(self._state):
            raise ValueError(
                f"collapse detector state has {sorted(state)}, but needs {sorted(self._state)}: start a new run"
            )
        self._state = {name: float(value) for name, value in state.items()}
