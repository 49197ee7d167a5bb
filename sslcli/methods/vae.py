"""VAE: code an image as a normal distribution that stays near the standard one, and draw it from a sample.

Kingma and Welling 2014  https://arxiv.org/abs/1312.6114
Higgins et al. 2017 (beta)  https://openreview.net/forum?id=Sy2fzU9gl
Kingma et al. 2016 (free bits)  https://arxiv.org/abs/1606.04934
Rybkin et al. 2021 (optimal sigma)  https://arxiv.org/abs/2006.13202   conf/method/vae.yaml

Shapes: N images a process, C channels, S their side in pixels, D size of the code.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.decoder import Decoder, FirstLook, psnr
from sslcli.distributed import all_gather, all_reduce_mean
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn import SyncBatchNorm, convert_batch_norm, full_precision
from sslcli.noise import Noise

LOG_VARIANCE = (-10.0, 10.0)  # where exp is harmless
SMALLEST_MSE = 1e-6  # about what the 256 levels of a byte leave: below it there is nothing to model
ACTIVE = 0.01  # variance of a unit's mean over images (Burda et al. 2016, arXiv:1509.00519)
PICTURE_SEED = 0  # of the samples in pictures, so that those of two epochs can be compared


class Posterior(NamedTuple):
    """q(z | x) of each image: a normal distribution with independent dimensions, both (N, D)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + deviation * noise, with `noise` (N, D) standard normal (eq. 10)."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal distribution in nats, (N, D) (appendix B)."""
        return -0.5 * (1 + self.logvar - self.mean.square() - self.logvar.exp())


def squared_error(drawn: Tensor, images: Tensor) -> Tensor:
    """(N,): the squared error of each image, summed over all its values."""
    return (drawn - images).square().flatten(1).sum(1)


def bernoulli_nll(logits: Tensor, images: Tensor) -> Tensor:
    """(N,): -log p(x | z) of each image in [0, 1] under independent Bernoulli values, summed over them."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1).sum(1)


def over_processes(local: Tensor) -> Tensor:
    """A mean over this process's images -> over those of all, with the gradient of this process's part."""
    return local + (all_reduce_mean(local.detach()) - local.detach())


def reconstruction_loss(drawn: Tensor, images: Tensor, *, kind: str, sigma: float | None) -> Tensor:
    """-log p(x | z) without its constants, summed over the values of an image, the mean over images; in nats.

    bernoulli takes `drawn` as logits. gaussian is |x^ - x|^2 / (2 sigma^2), or for sigma None that of the sigma which
    fits the errors of the step best, M/2 log(mean squared error) with M values an image (Rybkin et al.).
    """
    if kind == "bernoulli":
        return bernoulli_nll(drawn, images).mean()
    error = squared_error(drawn, images).mean()
    if sigma is not None:
        return error / (2 * sigma**2)
    size = images[0].numel()
    return size / 2 * (over_processes(error) / size).clamp_min(SMALLEST_MSE).log()


def divergence_loss(posterior: Posterior, *, free_bits: float = 0.0) -> Tensor:
    """KL(q(z|x) || p(z)) in nats: the mean over images, each dimension counted as at least `free_bits`.

    The mean over the images of all processes comes before that bound, so a unit may spend its bits on a few images.
    """
    units = over_processes(posterior.divergence().mean(0))  # (D,)
    return units.clamp_min(free_bits).sum() if free_bits else units.sum()


def active_units(means: Tensor) -> Tensor:
    """How many dimensions of the code tell images apart: (N, D) -> a scalar in [0, D]. 0 is a collapsed posterior."""
    return (means.var(0, correction=0) > ACTIVE).sum().to(means.dtype)


class VAE(Method):
    """The variational autoencoder, with beta, free bits and a decoder noise of its own choice.

    Args:
        image_size: side S of the images in pixels.
        channels: C of the images.
        dim: size D of the code.
        width: channels of the decoder's smallest map.
        beta: weight of the divergence, at least 0; 1 bounds the likelihood, more disentangles.
        free_bits: nats that each dimension of the code has for nothing, at least 0.
        kl_warmup: share of the run over which the weight of the divergence rises from 0 to beta, in [0, 1].
        reconstruction: gaussian, or bernoulli, whose decoder gives logits.
        sigma: standard deviation of the gaussian on the scale of the images; None: the best at each step.

    Images lie in [0, 1] (views.normalize=false); the first step refuses others. The posterior is sampled in training
    alone: features come from the backbone, the projection and pictures from the mean.
    Raises ValueError for values outside these.
    """

    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        dim: int = 128,
        width: int = 512,
        beta: float = 1.0,
        free_bits: float = 0.0,
        kl_warmup: float = 0.05,
        reconstruction: Literal["gaussian", "bernoulli"] = "gaussian",
        sigma: float | None = None,
    ) -> None:
        super().__init__(backbone)
        check_positive(dim=dim)
        check_values(beta=beta, free_bits=free_bits, kl_warmup=kl_warmup, reconstruction=reconstruction, sigma=sigma)
        self.to_mean = nn.Linear(num_features(backbone), dim)
        self.to_logvar = nn.Linear(num_features(backbone), dim)
        self.decoder = Decoder(dim, image_size=image_size, channels=channels, width=width)
        convert_batch_norm(self, SyncBatchNorm)
        self.noise = Noise()
        self.first_look = FirstLook((channels, image_size, image_size))
        self.beta, self.free_bits, self.kl_warmup = beta, free_bits, kl_warmup
        self.reconstruction, self.sigma = reconstruction, sigma
        self.kl_share: Tensor  # of beta, () in [0, 1]
        self.register_buffer("kl_share", torch.tensor(0.0 if kl_warmup else 1.0))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        self.first_look(images)
        images = full_precision(images)
        posterior = self.posterior(images)
        code = posterior.mean
        if self.training:
            code = posterior.sample(self.noise.normal(*code.shape, device=code.device).to(code.dtype))
        drawn = full_precision(self.decoder(code))
        fidelity = reconstruction_loss(drawn, images, kind=self.reconstruction, sigma=self.sigma)
        divergence = divergence_loss(posterior, free_bits=self.free_bits)
        self.embeddings = (posterior.mean.detach(),)
        # Divided by the number of values, so that the learning rate suits any image size; beta keeps its meaning.
        loss = (fidelity + self.beta * self.kl_share * divergence) / images[0].numel()
        return {
            "loss": loss,
            "kl": posterior.divergence().detach().sum(1).mean(),
            "kl_weight": self.beta * self.kl_share,
            "psnr": psnr(self.pixels(drawn.detach()), images),
            "active_units": active_units(all_gather(posterior.mean.detach())),
        }

    def after_step(self, progress: float) -> None:
        if self.kl_warmup:
            self.kl_share.fill_(min(1.0, progress / self.kl_warmup))

    def posterior(self, images: Tensor) -> Posterior:
        """q(z | x) of images (N, C, S, S)."""
        features = self.backbone(images)
        mean, logvar = full_precision(self.to_mean(features)), full_precision(self.to_logvar(features))
        return Posterior(mean, logvar.clamp(*LOG_VARIANCE))

    def check_views(self, views: list[Tensor]) -> None:
        self.first_look(views[0])

    def projection(self, images: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, D), the mean of the posterior."""
        return self.to_mean(self.backbone(images))  # type: ignore[no-any-return]

    def pixels(self, drawn: Tensor) -> Tensor:
        """What the decoder gave, as pixels."""
        return drawn.sigmoid() if self.reconstruction == "bernoulli" else drawn

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        mean = self.projection(images)
        prior = torch.randn(2 * len(mean), mean.shape[1], generator=torch.Generator().manual_seed(PICTURE_SEED))
        samples = self.pixels(self.decoder(prior.to(mean)))
        return {
            "reconstruction": [images, self.pixels(self.decoder(mean))],
            "samples": list(samples.chunk(2)),
        }


def check_values(*, beta: float, free_bits: float, kl_warmup: float, reconstruction: str, sigma: float | None) -> None:
    """Raise ValueError unless every value lies in its range."""
    for name, value in {"beta": beta, "free_bits": free_bits}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, but it must be at least 0")
    if not 0 <= kl_warmup <= 1:
        raise ValueError(f"kl_warmup is {kl_warmup}, but it is a share of the run, so it must lie in [0, 1]")
    if reconstruction not in ("gaussian", "bernoulli"):
        raise ValueError(f"reconstruction is {reconstruction!r}, but it must be gaussian or bernoulli")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma is {sigma}, but it must be positive, or null for the best at each step")
