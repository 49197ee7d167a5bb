"""BiGAN: a GAN with an encoder E. The discriminator distinguishes pairs (x, E(x)) from pairs (G(z), z).

At the optimum, the encoder E inverts the generator G.

Donahue et al. 2017  https://arxiv.org/abs/1605.09782   Dumoulin et al. 2017 (ALI)  https://arxiv.org/abs/1606.00704
Donahue and Simonyan 2019 (BigBiGAN: unary scores, hinge)  https://arxiv.org/abs/1907.02544
Li et al. 2017 (ALICE: cycle loss)  https://arxiv.org/abs/1709.01215
https://github.com/jeffdonahue/bigan  conf/method/bigan.yaml

Shapes: N images per process, C channels, S image side in pixels, D code size, K logits per pair.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sslcli.distributed.collectives import all_reduce_mean, world_size
from sslcli.errors import check_positive
from sslcli.methods.base import Batch
from sslcli.methods.code_input import check_code_from, code_input, code_input_width
from sslcli.methods.gan import (
    Game,
    call_on_buffer_copies,
    decoder_generator,
    discriminator_loss,
    distance,
    generator_loss,
    pixels,
)
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.conditional_gan import INIT_STD, ConditionalDiscriminator, ConditionalGenerator
from sslcli.nn.contrastive import check_momentum
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.modes import full_precision

NETWORKS = ("compact", "official")
SMALLEST_ERROR = 1e-12  # lower bound of a mean squared error by which another is divided
SLOPE = 0.2  # negative slope of LeakyReLU, as in DCGAN


class Discriminator(nn.Module):
    """Discriminator for pairs of an image and a code. All layers have spectral normalization and none has BatchNorm.

    Args:
        dim: code size D.
        image_size: image side S in pixels.
        channels: image channels C.
        width: channels of the first 4 x 4 convolution of stride 2. Each further convolution doubles the number of
            channels, up to 8 * width. The last feature map has a side of 2 or 3 pixels.
        hidden: width of the image embedding and of the code embedding. The layers that score the pair have 2 * hidden
            units.
        unary: True adds a score of the image alone and a score of the code alone (BigBiGAN, section 2).
    """

    def __init__(self, dim: int, *, image_size: int, channels: int, width: int, hidden: int, unary: bool) -> None:
        super().__init__()
        halvings = image_size.bit_length() - 2  # number of convolutions: 4 for 32 pixels, 5 for 64 and 96
        widths = [channels, *(width * min(2**depth, 8) for depth in range(halvings))]
        convolutions: list[nn.Module] = []
        for before, after in pairwise(widths):
            convolutions += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        last = widths[-1] * (image_size >> halvings) ** 2
        self.of_images = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(last, hidden), nn.LeakyReLU(SLOPE))
        self.of_codes = nn.Sequential(
            nn.Linear(dim, hidden), nn.LeakyReLU(SLOPE), nn.Linear(hidden, hidden), nn.LeakyReLU(SLOPE)
        )
        self.of_pairs = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.LeakyReLU(SLOPE), nn.Linear(2 * hidden, 1))
        self.unary = nn.ModuleList([nn.Linear(hidden, 1), nn.Linear(hidden, 1)] if unary else [])
        for layer in [part for part in self.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]:
            spectral_norm(layer)

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        """Return logits (N, K) for images (N, C, S, S) in [0, 1] and codes (N, D).

        K is 1: a logit for each pair of image and code. If `unary` is True, K is 3: the other logits are for the image
        alone and for the code alone.
        """
        x, z = self.of_images(2 * images - 1), self.of_codes(codes)  # (N, hidden) each
        scores = [self.of_pairs(torch.cat([x, z], 1))]
        scores += [score(part) for score, part in zip(self.unary, (x, z), strict=False)]
        return torch.cat(scores, 1)


class BiGAN(Game):
    """Adversarial feature learning with a generator G and a deterministic encoder E (a backbone and a linear layer).

    `encoder` is the trained encoder. `backbone` and `to_code` are the exponential moving average of the weights of
    `encoder`. This average is evaluated and exported. BatchNorm statistics are copied from `encoder` without averaging.

    Args:
        image_size, channels, dim, prior, loss, r1, r1_every, discriminator_lr: see `Game`. With the uniform prior, E
            ends with tanh(v / 2), where v is the output of the linear layer. This bounds codes to [-1, 1], as in
            `UniformDistribution` of the official code.
        width: channels of the generator's first feature map, which has the smallest side.
        code_from: features or map. With features, E computes the code from the output of the backbone, which most
            backbones average over height and width. With map, E computes it from all values of the backbone's last
            feature map. The code can then contain positions in the image even if the features do not.
        networks: compact or official. In the compact networks, the discriminator combines image and code only in its
            last two layers, and the code enters the generator at its first layer. In the official networks, the code
            enters the discriminator at every convolution except the first, and the generator at every convolution
            except the last.
        discriminator_width: channels of the discriminator's first convolution.
        hidden: width of the image and code embeddings in the compact discriminator.
        unary: True adds a score of the image alone and a score of the code alone to the discriminator.
        momentum: final momentum of the moving average, in [0, 1]. After t steps, the momentum is at most
            (1 + t) / (10 + t).
        cycle: weight of the cycle loss mean (x - G(E(x)))^2 of E and G, at least 0 (ALICE); 0 disables it.

    Raises ValueError if an argument is out of range, if the official networks are combined with `unary` or `r1`, or if
    `code_from` is map and the backbone has no `stages`.
    """

    decreasing_metric = "reconstruction_ratio"
    discriminator_parts = ("discriminator",)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        dim: int = 100,
        width: int = 512,
        code_from: Literal["features", "map"] = "features",
        prior: Literal["normal", "uniform"] = "normal",
        networks: Literal["compact", "official"] = "compact",
        discriminator_width: int = 64,
        hidden: int = 512,
        loss: Literal["logistic", "hinge"] = "logistic",
        unary: bool = False,
        r1: float = 0.0,
        r1_every: int = 16,
        discriminator_lr: float = 1.0,
        momentum: float = 0.999,
        cycle: float = 0.0,
    ) -> None:
        check_momentum(momentum)
        check_positive(discriminator_width=discriminator_width, hidden=hidden)
        check_options(code_from=code_from, networks=networks, unary=unary, r1=r1, cycle=cycle)
        official, images = networks == "official", {"image_size": image_size, "channels": channels}
        super().__init__(
            frozen_copy(backbone),
            generator=(
                nn.Sequential(ConditionalGenerator(dim, **images, width=width), nn.Tanh())
                if official
                else decoder_generator(dim, **images, width=width)
            ),
            **images,
            dim=dim,
            prior=prior,
            loss=loss,
            r1=r1,
            r1_every=r1_every,
            discriminator_lr=discriminator_lr,
        )
        self.code_from = code_from
        to_code = nn.Linear(code_input_width(backbone, code_from, **images), dim)
        if official:
            nn.init.normal_(to_code.weight, std=INIT_STD)
        self.encoder = nn.Sequential(backbone, to_code)
        self.to_code = frozen_copy(to_code)
        convert_batch_norm(self, SyncBatchNorm)
        self.average_generator = frozen_copy(self.generator)
        self.discriminator = (
            convert_batch_norm(ConditionalDiscriminator(dim, **images, width=discriminator_width), SyncBatchNorm)
            if official
            else Discriminator(dim, **images, width=discriminator_width, hidden=hidden, unary=unary)
        )
        self.momentum, self.cycle = momentum, cycle

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        self.first_look(images)
        prior = self.codes(images)
        codes, drawn = self.encode(images, *self.encoder), pixels(self.generator(prior))
        self.embeddings = (codes.detach(),)

        # Discriminator loss: the encoder and the generator get no gradient.
        x, z = torch.cat([images, drawn.detach()]), torch.cat([codes.detach(), prior])
        real, fake = self.discriminator(x, z).chunk(2)
        loss_d = discriminator_loss(real, fake, kind=self.loss)
        penalty = self.penalty(
            lambda x: call_on_buffer_copies(self.discriminator, x, full_precision(codes.detach()), learn=True), images
        )

        # Loss of the encoder and the generator, with swapped labels. The discriminator gets no gradient.
        real, fake = call_on_buffer_copies(
            self.discriminator, torch.cat([images, drawn]), torch.cat([codes, prior])
        ).chunk(2)
        loss_eg = generator_loss(-real, kind=self.loss) + generator_loss(fake, kind=self.loss)
        rebuilt = self.reconstruct(codes)  # G(E(x))
        cycle = self.cycle_loss(rebuilt, images)
        return {
            "loss": loss_d + loss_eg + penalty.get("r1", 0.0) + cycle.get("cycle", 0.0),
            "loss_d": loss_d,
            "loss_g": loss_eg,
            **penalty,
            **cycle,
            **reconstruction_errors(rebuilt, images),
            "distance": distance(drawn, images),
        }

    def encode(self, images: Tensor, backbone: nn.Module, to_code: nn.Module) -> Tensor:
        """Return codes in the range of the prior: (N, C, S, S) -> (N, D)."""
        codes: Tensor = to_code(code_input(backbone, self.code_from, images))
        return torch.tanh(codes / 2) if self.prior == "uniform" else codes

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Return the images that the generator G computes from codes: (N, D) -> (N, C, S, S).

        G and the encoder E, which computes the codes, get a gradient only if the cycle loss is enabled. This pass does
        not update the running statistics of BatchNorm in G. Only passes with codes from the prior update them.
        """
        with torch.set_grad_enabled(self.cycle > 0 and torch.is_grad_enabled()):
            return pixels(call_on_buffer_copies(self.generator, codes, learn=True))

    def cycle_loss(self, rebuilt: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Return {"cycle": weighted cycle loss}, or {} if the cycle loss is disabled.

        The cycle loss is the mean squared error between reconstructions `rebuilt` and `images`, both (N, C, S, S).
        """
        if not self.cycle:
            return {}
        return {"cycle": self.cycle * F.mse_loss(full_precision(rebuilt), full_precision(images))}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        # Early steps use a smaller momentum: with 0.999, short runs would keep the random initialization.
        momentum = min(self.momentum, (1 + self.steps) / (10 + self.steps))
        pairs = [
            (self.backbone, self.encoder[0]),
            (self.to_code, self.encoder[1]),
            (self.average_generator, self.generator),
        ]
        for average, trained in pairs:
            ema_update(average, trained, momentum)
            for mine, theirs in zip(average.buffers(), trained.buffers(), strict=True):
                mine.copy_(theirs)

    def projection(self, images: Tensor) -> Tensor:
        """Return the code: (N, C, S, S) -> (N, D)."""
        return self.encode(images, self.backbone, self.to_code)

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        drawn = pixels(self.average_generator(self.projection(images)))
        return {"reconstruction": [images, drawn], "samples": self.samples(self.average_generator, images)}

    def effective(self, batch_size: int) -> dict[str, Any]:
        return {"evaluated network": f"the average of the encoder, momentum {self.momentum}"}


def check_options(*, code_from: str, networks: str, unary: bool, r1: float, cycle: float) -> None:
    """Raise ValueError if a value is unknown or out of range, or if options exclude each other."""
    check_code_from(code_from)
    if networks not in NETWORKS:
        raise ValueError(f"networks is {networks!r}, but it must be one of {', '.join(NETWORKS)}")
    if networks == "official" and (unary or r1):
        raise ValueError(
            f"networks is 'official', but unary is {unary} and r1 is {r1}: the official discriminator has no score of "
            "the image alone, and its BatchNorm makes the gradient of one image depend on other images. Use "
            "unary=false and r1=0, or networks=compact"
        )
    if not 0 <= cycle < math.inf:
        raise ValueError(f"cycle is {cycle}, but the weight of a loss must be at least 0 (0 disables it)")


@torch.no_grad()
def reconstruction_errors(rebuilt: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Compare images x with their reconstructions G(E(x)) and with the reconstructions of other images.

    `rebuilt` and `images` are (N, C, S, S). The values are root mean squared errors over the images of all processes:

    - reconstruction: distance of x to G(E(x)).
    - shuffled_reconstruction: distance of x to G(E(x')), over all pairs of two different images x and x'.
    - reconstruction_ratio: the first distance divided by the second. At 1, reconstructions do not depend on their
      image. A reconstruction by the mean color of all images has a small error and a ratio of 1.
    """
    # Values around 0, which reduces rounding errors. (N, C S S) each
    x, y = (full_precision(part).flatten(1) - 0.5 for part in (images, rebuilt))
    errors = torch.stack([(x - y).square().mean(), x.square().mean() + y.square().mean()])
    means = all_reduce_mean(torch.cat([errors, x.mean(0), y.mean(0)]))  # one collective
    paired, squares = means[:2]
    mean_x, mean_y = means[2:].chunk(2)  # (C S S,) each
    every = squares - 2 * (mean_x * mean_y).mean()  # mean over all pairs, including x' = x
    count = world_size() * len(x)
    shuffled = (count * every - paired) / (count - 1) if count > 1 else paired
    # The bound matters only if all images and reconstructions are equal.
    paired, shuffled = paired.sqrt(), shuffled.clamp_min(SMALLEST_ERROR).sqrt()
    return {
        "reconstruction": paired,
        "shuffled_reconstruction": shuffled,
        "reconstruction_ratio": paired / shuffled,
    }
