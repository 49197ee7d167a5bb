"""VAE: encode an image as a normal distribution close to N(0, I), and reconstruct the image from a sample.

Kingma and Welling 2014  https://arxiv.org/abs/1312.6114
Higgins et al. 2017 (beta)  https://openreview.net/forum?id=Sy2fzU9gl
Kingma et al. 2016 (free bits)  https://arxiv.org/abs/1606.04934
Rybkin et al. 2021 (optimal sigma)  https://arxiv.org/abs/2006.13202   conf/method/vae.yaml

Shapes: N images per process, C channels, S image side in pixels, D code size.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather, all_reduce_mean
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.decoder import Decoder, FirstLook, psnr
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise

LOG_VARIANCE = (-10.0, 10.0)  # range to which log-variances are clamped; prevents overflow of exp
SMALLEST_MSE = 1e-6  # lower bound of the mean squared error, about the quantization error of 8-bit images
# A code dimension is active if the variance of its posterior mean over images is larger than this value (Burda et al.
# 2016, arXiv:1509.00519).
ACTIVE = 0.01
PICTURE_SEED = 0  # seed of the saved samples; it is fixed to make the samples of different epochs comparable


class Posterior(NamedTuple):
    """Posterior q(z | x) of each image: a normal distribution with independent dimensions.

    Mean and log-variance are (N, D).
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return one sample per image from its posterior, (N, D): mean + standard deviation * `noise` (eq. 10).

        `noise` (N, D) contains standard normal random numbers.
        """
        return self.mean + (0.5 * self.logvar).exp() * noise

    def divergence(self) -> Tensor:
        """Return the KL divergence of each dimension of the posterior from the standard normal (appendix B).

        Shape: (N, D) for N images and D dimensions, in nats.
        """
        return -0.5 * (1 + self.logvar - self.mean.square() - self.logvar.exp())


def squared_error(drawn: Tensor, images: Tensor) -> Tensor:
    """Return the squared error (N,) of the reconstructions `drawn`, summed over all values of each image."""
    return (drawn - images).square().flatten(1).sum(1)


def bernoulli_nll(logits: Tensor, images: Tensor) -> Tensor:
    """Return -log p(x | z) per image (N,), summed over independent Bernoulli values. Images x are in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1).sum(1)


def over_processes(local: Tensor) -> Tensor:
    """Return the mean of `local` over all processes.

    The gradient of the result is passed unchanged to `local` of this process. Other processes get no gradient from it.
    """
    return local + (all_reduce_mean(local.detach()) - local.detach())


def reconstruction_loss(drawn: Tensor, images: Tensor, *, kind: str, sigma: float | None) -> Tensor:
    """Return -log p(x | z) in nats, summed over the values of an image, mean over images.

    Constants are left out, such as log(2 pi) terms of the normal distribution.

    kind="bernoulli": `drawn` are logits, and the loss is the binary cross-entropy.
    kind="gaussian": the loss is |drawn - images|^2 / (2 sigma^2). If `sigma` is None, the one sigma that
    maximizes the likelihood of all images of the step is used (Rybkin et al.). The loss is then M/2 log(mean squared
    error) for M values per image.
    """
    if kind == "bernoulli":
        return bernoulli_nll(drawn, images).mean()
    error = squared_error(drawn, images).mean()
    if sigma is not None:
        return error / (2 * sigma**2)
    size = images[0].numel()
    return size / 2 * (over_processes(error) / size).clamp_min(SMALLEST_MSE).log()


def divergence_loss(posterior: Posterior, *, free_bits: float = 0.0) -> Tensor:
    """Return KL(q(z|x) || p(z)) in nats, with free bits.

    For each dimension, the mean divergence over the images of all processes is computed and then clamped to at least
    `free_bits`. The result is the sum over dimensions. The mean is clamped, not the divergence of each image. A few
    images may therefore use all free bits of a dimension.
    """
    units = over_processes(posterior.divergence().mean(0))  # (D,)
    return units.clamp_min(free_bits).sum() if free_bits else units.sum()


def active_units(means: Tensor) -> Tensor:
    """Return the number of active code dimensions, 0 to D, for posterior means (N, D). 0 is posterior collapse.

    A dimension is active if the variance of its posterior mean over the N images is larger than `ACTIVE`.
    """
    return (means.var(0, correction=0) > ACTIVE).sum().to(means.dtype)


class VAE(Method):
    """Variational autoencoder with the weight beta of the KL divergence, free bits, and an optimal or a fixed sigma.

    Args:
        image_size: image side S in pixels.
        channels: image channels C.
        dim: code size D.
        width: channels of the decoder's first feature map, which has the smallest side.
        beta: weight of the KL divergence, at least 0. With 1 and without free bits, the loss is the negative
            evidence lower bound (ELBO), up to constants. Larger values favor disentangled codes.
        free_bits: KL divergence per code dimension that is not penalized, in nats, at least 0.
        kl_warmup: fraction of the run over which the KL weight increases from 0 to beta, in [0, 1].
        reconstruction: "gaussian" or "bernoulli". With "bernoulli", the decoder outputs logits.
        sigma: standard deviation of "gaussian", on the scale of the images. None selects the optimal value in each
            step.

    Images must be in [0, 1] (views.normalize=false). The first step raises ConfigError if they are not. The posterior
    is sampled only in training. The features are the output of the backbone. `projection` and saved images use the
    posterior mean. Raises ValueError if an argument is out of range.
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
        self.kl_fraction: Tensor  # scalar tensor: current KL weight as a fraction of beta, in [0, 1]
        self.register_buffer("kl_fraction", torch.tensor(0.0 if kl_warmup else 1.0))

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
        # The division by the number of values makes the learning rate independent of the image size. Both terms are
        # divided, so the meaning of beta does not change.
        loss = (fidelity + self.beta * self.kl_fraction * divergence) / images[0].numel()
        return {
            "loss": loss,
            "kl": posterior.divergence().detach().sum(1).mean(),
            "kl_weight": self.beta * self.kl_fraction,
            "psnr": psnr(self.pixels(drawn.detach()), images),
            "active_units": active_units(all_gather(posterior.mean.detach())),
        }

    def scheduled(self, progress: float) -> dict[str, float]:
        return {"KL weight": self.beta * min(1.0, progress / self.kl_warmup)} if self.kl_warmup else {}

    def after_step(self, progress: float) -> None:
        if self.kl_warmup:
            self.kl_fraction.fill_(min(1.0, progress / self.kl_warmup))

    def posterior(self, images: Tensor) -> Posterior:
        """Return the posterior q(z | x) of images x (N, C, S, S)."""
        features = self.backbone(images)
        mean, logvar = full_precision(self.to_mean(features)), full_precision(self.to_logvar(features))
        return Posterior(mean, logvar.clamp(*LOG_VARIANCE))

    def check_views(self, views: list[Tensor]) -> None:
        self.first_look(views[0])

    def projection(self, images: Tensor) -> Tensor:
        """Return the posterior mean: (N, C, S, S) -> (N, D)."""
        return self.to_mean(self.backbone(images))  # type: ignore[no-any-return]

    def pixels(self, drawn: Tensor) -> Tensor:
        """Convert the decoder output to pixels: the sigmoid for "bernoulli", the output itself for "gaussian"."""
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
    """Raise ValueError if a value is out of range."""
    for name, value in {"beta": beta, "free_bits": free_bits}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, but it must be at least 0")
    if not 0 <= kl_warmup <= 1:
        raise ValueError(f"kl_warmup is {kl_warmup}, but it is a fraction of the run, so it must be in [0, 1]")
    if reconstruction not in ("gaussian", "bernoulli"):
        raise ValueError(f"reconstruction is {reconstruction!r}, but it must be gaussian or bernoulli")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma is {sigma}, but it must be positive, or null for the optimal value at each step")
