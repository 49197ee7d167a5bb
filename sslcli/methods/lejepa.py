"""LeJEPA: similar embeddings of all views, and a test that the embeddings are normally distributed (SIGReg).

Balestriero, LeCun 2025  https://arxiv.org/abs/2511.08544   conf/method/lejepa.yaml

Official code: lejepa/ and MINIMAL.md of rbalestr-lab/lejepa.

Shapes: V views, N images per process, W processes, G = W N images, D embedding size, S directions, T knots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslcli.distributed.collectives import all_gather_with_grad, single_process, world_size
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision
from sslcli.nn.multi_crop import forward_by_size
from sslcli.nn.noise import Noise

KNOTS = 17  # knots of the integral on [0, LIMIT]; lejepa/univariate/epps_pulley.py
LIMIT = 3.0
BLOCK = 128  # directions whose (V, N, BLOCK, T) values are in memory at once


def characteristic(samples: Tensor, knots: Tensor) -> Tensor:
    """Return the means over samples of cos(t x) and sin(t x) for each knot t: (V, N, S) -> (2, V, S, T)."""
    angles = samples[..., None] * knots
    return torch.stack([angles.cos().mean(1), angles.sin().mean(1)])


def epps_pulley(samples: Tensor, *, knots: int = KNOTS, limit: float = LIMIT) -> Tensor:
    """Return the Epps-Pulley statistic of each of S one-dimensional samples against N(0, 1): (V, N, S) -> (V, S).

    The statistic of a sample of G numbers, N on each process, is

        G times the integral over [-limit, limit] of exp(-t^2 / 2) |phi(t) - exp(-t^2 / 2)|^2 dt,

    where phi is the empirical characteristic function. The integrand is symmetric, so the trapezoidal rule has `knots`
    knots on [0, limit]. For standard normal samples, the expected value is 1.05 for any G. For a sample of zeros, the
    statistic is 0.402 G. Gradients flow to the samples of all processes.
    """
    t = torch.linspace(0, limit, knots, dtype=samples.dtype, device=samples.device)
    normal = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * limit / (knots - 1))
    weights[:: knots - 1] /= 2
    means: Tensor = torch.cat(
        [
            checkpoint(characteristic, block, t, use_reentrant=False, preserve_rng_state=False)
            for block in torch.split(samples, BLOCK, dim=2)
        ],
        dim=2,
    )
    cosine, sine = all_gather_with_grad(means[None]).mean(0)  # (V, S, T) each
    distance: Tensor = (cosine - normal).square() + sine.square()
    return (distance @ (weights * normal)) * (world_size() * samples.shape[1])


def sigreg(z: Tensor, directions: Tensor, *, knots: int = KNOTS, limit: float = LIMIT) -> Tensor:
    """Return the mean of the Epps-Pulley statistic over views and random directions, a scalar.

    `z` (V, N, D) are embeddings, and each view is a sample of its own. The columns of `directions` (D, S) are
    normalized in this function. The statistic is computed in float32 (float64 for float64 inputs).
    """
    with torch.autocast(z.device.type, enabled=False):
        z = full_precision(z)
        return epps_pulley(z @ F.normalize(directions.to(z.dtype), dim=0), knots=knots, limit=limit).mean()


def invariance(z: Tensor, *, num_global: int) -> Tensor:
    """Return the mean squared distance of the embeddings (V, N, D) to the mean of the global views of their image.

    The first `num_global` views are global. The mean has a gradient as well. A scalar.
    """
    z = full_precision(z)
    return (z - z[:num_global].mean(0)).square().mean()


class LeJEPA(Method):
    """Latent-Euclidean joint-embedding predictive architecture. There is no predictor, teacher or stop-gradient.

    Args:
        dim: embedding size D.
        hidden: width of the two hidden layers of the projector.
        num_views: number of views V. The global views are the first ones, which all have the size of the first view.
        weight: lambda, the weight of SIGReg in [0, 1]. The weight of the invariance is 1 - lambda. SIGReg grows with
            the batch size, so the best value depends on it. With 0, the embeddings collapse.
        num_directions: number S of random directions, which are new in each step.
    """

    num_views = 2
    directions: Tensor  # (D, S), normal random numbers for the next step, equal on all processes

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 64,
        hidden: int = 2048,
        num_views: int = 2,
        weight: float = 0.02,
        num_directions: int = 1024,
    ) -> None:
        super().__init__(backbone)
        check_positive(num_directions=num_directions)
        if num_views < 2:
            raise ValueError(f"num_views is {num_views}, but views of an image are compared: choose at least 2")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight}, but the weights of both terms are weight and 1 - weight")
        self.projector = mlp([num_features(backbone), hidden, hidden, dim], bias=True, last_bias=True)
        convert_batch_norm(self, SyncBatchNorm)
        self.num_views = num_views
        self.weight = weight
        self.noise = Noise()
        self.register_buffer("directions", torch.empty(dim, num_directions))
        self.draw_directions()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views = batch.views
        z = self.projector(forward_by_size(self.backbone, views)).view(len(views), len(views[0]), -1)  # (V, N, D)
        num_global = sum(view.shape == views[0].shape for view in views)
        near, normal = invariance(z, num_global=num_global), sigreg(z, self.directions)
        self.embeddings = tuple(full_precision(view.detach()) for view in z[:num_global])
        return {"loss": (1 - self.weight) * near + self.weight * normal, "invariance": near, "sigreg": normal}

    def check_views(self, views: list[Tensor]) -> None:
        is_global = [view.shape == views[0].shape for view in views]
        if False in is_global and True in is_global[(local := is_global.index(False)) :]:
            raise ValueError(
                f"view {local + 1} has another size than view 1, but a later view has the size of view 1: put all "
                "views of this size, the global views, before the others in views.views"
            )

    def after_step(self, progress: float) -> None:
        self.draw_directions()

    @torch.no_grad()
    def draw_directions(self) -> None:
        with single_process():  # the same numbers on all processes
            self.directions.copy_(self.noise.normal(*self.directions.shape, device=self.directions.device))

    def projection(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]

    def num_negatives(self, batch_size: int) -> int:
        return 0
