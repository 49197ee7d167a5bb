"""How healthy a representation is, measured without labels, and when to call it collapsed.

    feature_std, mean_norm    SimSiam, arXiv:2011.10566, fig. 2: 1/sqrt(d) and 0 when spread, 0 and 1 when collapsed
    alignment, uniformity     Wang and Isola, arXiv:2005.10242, eq. 2 and 3
    rankme                    Garrido et al., arXiv:2210.02885, eq. 2 and 3
    alpha_req                 Agrawal et al., arXiv:2202.05808: exponent of the eigenvalue spectrum
    lidar                     Thilak et al., arXiv:2312.04000: rank of the linear discriminant of views of images

All are pure functions of finite float32 or float64 features. N images, d dimensions, q views of an image. In a
distributed run gather the features first: none of these is the mean of its values on parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.nn import full_precision

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
        "weight decay; augmentations so strong that views share little; a decorrelation or centring term with "
        "too small a weight. Lower the learning rate, then weaken the augmentations."
    ),
}


def _matrix(z: Tensor, name: str = "z") -> Tensor:
    """Check that `z` is a floating (N >= 2, d) matrix, and leave half precision: exp and SVD need float32."""
    if z.ndim != 2 or len(z) < 2 or not z.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(z.shape)} and dtype {z.dtype}, but features must be a floating matrix "
            "(N, d) of at least 2 rows: pass one row an image"
        )
    return full_precision(z)


def feature_std(z: Tensor, *, biased: bool = False) -> Tensor:
    """Mean over dimensions of the standard deviation of the L2-normalised rows of `z` (N, d). Scalar in [0, 1].

    About 1/sqrt(d) when the rows fill the sphere, 0 when they are one point. `biased` divides by N instead of N - 1.
    """
    std: Tensor = F.normalize(_matrix(z), dim=1).std(dim=0, correction=0 if biased else 1)
    return std.mean()


def mean_norm(z: Tensor) -> Tensor:
    """Norm of the mean of the L2-normalised rows of `z` (N, d): 0 for a centred cloud, 1 for a single point."""
    norm: Tensor = torch.linalg.vector_norm(F.normalize(_matrix(z), dim=1).mean(dim=0))
    return norm


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Mean of |x - y|^alpha over positive pairs (rows of `z1` and `z2`, both (N, d), normalised here).

    0 when views of one image coincide; 2 - 2 cos for alpha 2 (Wang and Isola, eq. 2).
    """
    if z1.shape != z2.shape:
        raise ValueError(
            f"z1 {tuple(z1.shape)} and z2 {tuple(z2.shape)} differ in shape: give two views of the same images"
        )
    x, y = F.normalize(_matrix(z1, "z1"), dim=1), F.normalize(_matrix(z2, "z2"), dim=1)
    return (x - y).square().sum(dim=1).pow(alpha / 2).mean()


def uniformity(z: Tensor, *, t: float = 2.0, chunk: int = 1024) -> Tensor:
    """log of the mean over pairs i < j of exp(-t |x_i - x_j|^2), rows of `z` (N, d) normalised here.

    0 when collapsed, about -2t + 2t^2/d when uniform on the sphere (Wang and Isola, eq. 3). Differentiable; never
    more than chunk x N similarities at once.
    """
    x = F.normalize(_matrix(z), dim=1)
    n = len(x)
    sums = []
    for start in range(0, n - 1, chunk):
        rows = x[start : start + chunk]
        exponent = -t * (2 - 2 * rows @ x[start:].T).clamp_min(0)
        # Row r of the chunk is column r of the remaining images, so i < j is the strict upper triangle.
        below = torch.ones_like(exponent, dtype=torch.bool).tril()
        sums.append(torch.logsumexp(exponent.masked_fill(below, -math.inf).flatten(), dim=0))
    return torch.logsumexp(torch.stack(sums), dim=0) - math.log(n * (n - 1) / 2)


def rankme(z: Tensor, *, eps: float = 1e-7) -> Tensor:
    """exp of the entropy of the singular values of `z` (N, d), not centred: a smooth rank in [1, min(N, d)].

    p = sigma / sum(sigma) + eps (Garrido et al., eq. 2). Compare only values from the same N; the paper uses 25,600.
    """
    sigma = torch.linalg.svdvals(_matrix(z))
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + eps
    return torch.exp(-(p * p.log()).sum())


def effective_rank(z: Tensor) -> Tensor:
    """exp of the entropy of the singular values of `z` (N, d) centred, without eps (Roy and Vetterli, 2007).

    Unlike `rankme` it does not count the common mean as a direction. Scalar in [1, min(N - 1, d)].
    """
    z = _matrix(z)
    sigma = torch.linalg.svdvals(z - z.mean(dim=0))
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.exp(-torch.xlogy(p, p).sum())


def alpha_req(z: Tensor, *, skip: int = 10, floor: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Exponent alpha of the power law lambda_i = c i^-alpha of the covariance eigenvalues of `z` (N, d), and R^2.

    Least squares of log lambda on log i without the first `skip` eigenvalues and those below `floor` of the
    largest. About 1 is good; much larger is (dimensionally) collapsed, smaller is noisy. Both are NaN where
    fewer than 3 eigenvalues are left.
    """
    z = _matrix(z).double()
    eigenvalues = torch.linalg.svdvals(z - z.mean(dim=0)).square()
    index = torch.arange(1, len(eigenvalues) + 1, dtype=z.dtype, device=z.device)
    used = (index > skip) & (eigenvalues > floor * eigenvalues[0])
    if int(used.sum()) < 3:
        return z.new_full((), math.nan), z.new_full((), math.nan)
    x, y = index[used].log(), eigenvalues[used].log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / x.square().sum()
    residual = (y - slope * x).square().sum()
    return -slope, 1 - residual / y.square().sum().clamp_min(torch.finfo(y.dtype).tiny)


def lidar(z: Tensor, *, delta: float = 1e-4, eps: float = 1e-7) -> Tensor:
    """Smooth rank of the linear discriminant that tells images apart, from `z` (n images, q views, d).

    exp of the entropy of the eigenvalues of W^-1/2 B W^-1/2 with B the scatter between images and W = scatter
    within + delta I (Thilak et al., section 4). In [1, min(d, n - 1)]; computed in float64, for eigh.
    """
    if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] < 2:
        raise ValueError(
            f"z has shape {tuple(z.shape)}, but lidar needs (n, q, d) with at least 2 images of at least 2 views: "
            "stack the views of one image on axis 1"
        )
    z = z.double()
    n, q, d = z.shape
    means = z.mean(dim=1)
    between = means - means.mean(dim=0)
    within = (z - means[:, None]).reshape(n * q, d)
    scatter = within.T @ within / (n * (q - 1)) + delta * torch.eye(d, dtype=z.dtype, device=z.device)
    values, vectors = torch.linalg.eigh(scatter)
    whitened = between @ vectors * values.clamp_min(torch.finfo(z.dtype).tiny).rsqrt() / math.sqrt(n - 1)
    eigenvalues = torch.linalg.svdvals(whitened).square()
    p = eigenvalues / eigenvalues.sum().clamp_min(torch.finfo(z.dtype).tiny) + eps
    return torch.exp(-(p * p.log()).sum())


@torch.no_grad()
def measure(z: Tensor, other: Tensor | None = None) -> dict[str, float]:
    """The quick measures of one batch of embeddings `z` (N, d), as floats: std, mean_norm, uniformity, rankme.

    With `other` (N, d), the second view of the same images, also alignment. All are NaN when `z` is not finite.
    Waits for the device: call it only where the loop logs.
    """
    z = _matrix(z.detach())
    if not bool(torch.isfinite(z).all()):
        names = ["std", "mean_norm", "uniformity", "rankme"] + (["alignment"] if other is not None else [])
        return dict.fromkeys(names, math.nan)
    values = {
        "std": float(feature_std(z)),
        "mean_norm": float(mean_norm(z)),
        "uniformity": float(uniformity(z)),
        "rankme": float(rankme(z)),
    }
    if other is not None:
        values["alignment"] = float(alignment(z, other.detach()))
    return values


class CollapseJudge:
    """Tells from the measures of the embeddings whether a run is collapsing.

    Feed it the first step, which shows the random start, then at fixed steps: a fall is told by comparison with what
    was, and a bad enough run is a single point 50 steps later. A measure alarms when it is small *and* has fallen.
    Small alone is also true of a healthy net without BatchNorm, whose embeddings nearly coincide until training
    spreads them.

        std         < 0.2 / sqrt(d)                        and < half its largest value so far
        uniformity  > -0.5                                 and |.| < a quarter of its largest (a distance squared)
        rankme      < 10 % of its largest value so far     and < 5, so that ten tight classes are no collapse
        std         < 0.02 / sqrt(d) at `patience` measurements in a row, wherever it started from

    It answers only after `grace` measurements, and at the second alarm in a row: a single batch proves nothing.
    Everything it remembers is in `state_dict`, so a resumed run answers as one never stopped.
    """

    def __init__(self, *, grace: int = 2, patience: int = 10) -> None:
        if grace < 1 or patience < 1:
            raise ValueError(f"grace={grace} and patience={patience} must be at least 1 measurement")
        self.grace = grace
        self.patience = patience
        self._state = {"seen": 0.0, "alarms": 0.0, "stuck": 0.0, "std": 0.0, "spread": 0.0, "rankme": 0.0}

    def update(self, values: Mapping[str, float], *, dim: int) -> str | None:
        """Take the `measure` of one batch of embeddings of width `dim`; an explanation when they collapse, else None.

        Measurements with a value that is not finite are left out: that is a failure of another kind.
        """
        std, spread, rank = values["std"], -values["uniformity"], values["rankme"]
        if not all(math.isfinite(v) for v in (std, spread, rank)):
            return None
        state = self._state
        state["seen"] += 1
        for name, value in (("std", std), ("spread", spread), ("rankme", rank)):
            state[name] = max(state[name], value)
        state["stuck"] = state["stuck"] + 1 if std * math.sqrt(dim) < 0.02 else 0.0
        verdict = self._judge(std, spread, rank, dim)
        if state["seen"] <= self.grace or verdict is None:
            state["alarms"] = 0.0
            return None
        state["alarms"] += 1
        return verdict if state["alarms"] >= 2 else None

    def _judge(self, std: float, spread: float, rank: float, dim: int) -> str | None:
        """The alarm of this one measurement, given what has been seen, or None."""
        peak = self._state
        limit = 0.2 / math.sqrt(dim)
        if (std < limit and std < 0.5 * peak["std"]) or peak["stuck"] >= self.patience:
            found = f"std of the normalised embeddings is {std:.2g}, below {limit:.2g} = 0.2/sqrt({dim})"
            return f"{found}. {_REMEDY['point']}"
        if spread < 0.5 and spread < 0.25 * peak["spread"]:
            return f"uniformity is {-spread:.2g}, above -0.5 (it was {-peak['spread']:.2g}). {_REMEDY['crowd']}"
        if rank < 5 and rank < 0.1 * peak["rankme"]:
            return f"RankMe is {rank:.3g}, below 10 % of the {peak['rankme']:.3g} it was. {_REMEDY['rank']}"
        return None

    def state_dict(self) -> dict[str, float]:
        """What has been seen so far, as plain numbers."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a `state_dict`. Raises ValueError when its names are not those of this version."""
        if set(state) != set(self._state):
            raise ValueError(f"collapse judge state has {sorted(state)}, but needs {sorted(self._state)}: start afresh")
        self._state = {name: float(value) for name, value in state.items()}
