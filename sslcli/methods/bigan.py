"""BiGAN: a GAN with an encoder E. The discriminator distinguishes pairs (x, E(x)) from pairs (G(z), z).

At the optimum, the encoder E inverts the generator G.

Donahue et al. 2017  https://arxiv.org/abs/1605.09782   Dumoulin et al. 2017 (ALI)  https://arxiv.org/abs/1606.00704
Donahue and Simonyan 2019 (BigBiGAN: unary scores, hinge)  https://arxiv.org/abs/1907.02544   conf/method/bigan.yaml

Shapes: N images per process, C channels, S image side in pixels, D code size, K logits per pair.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sslcli.errors import check_positive
from sslcli.methods.base import Batch, num_features
from sslcli.methods.gan import Game, call_on_buffer_copies, discriminator_loss, distance, generator_loss, pixels
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import check_momentum
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.modes import full_precision

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
        """Return logits (N, K) for images (N, C, S, S) in [0, 1] and codes (N, D). K is 1, or 3 with unary scores."""
        x, z = self.of_images(2 * images - 1), self.of_codes(codes)  # (N, hidden) each
        scores = [self.of_pairs(torch.cat([x, z], 1))]
        scores += [score(part) for score, part in zip(self.unary, (x, z), strict=False)]
        return torch.cat(scores, 1)


class BiGAN(Game):
    """Adversarial feature learning with a deterministic encoder: a backbone and a linear layer.

    `encoder` is the trained encoder. `backbone` and `to_code` are the exponential moving average of the weights of
    `encoder`. This average is evaluated and exported. BatchNorm statistics are copied from `encoder` without averaging.

    Args:
        image_size, channels, dim, width, loss, r1, r1_every, discriminator_lr: see `Game`.
        discriminator_width: channels of the discriminator's first convolution.
        hidden: width of the image and code embeddings in the discriminator.
        unary: True adds a score of the image alone and a score of the code alone to the discriminator.
        momentum: final momentum of the moving average, in [0, 1]. After t steps, the momentum is at most
            (1 + t) / (10 + t).
    """

    decreasing_metric = "reconstruction"
    discriminator_parts = ("discriminator",)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        dim: int = 100,
        width: int = 512,
        discriminator_width: int = 64,
        hidden: int = 512,
        loss: Literal["logistic", "hinge"] = "logistic",
        unary: bool = False,
        r1: float = 0.0,
        r1_every: int = 16,
        discriminator_lr: float = 1.0,
        momentum: float = 0.999,
    ) -> None:
        check_momentum(momentum)
        check_positive(discriminator_width=discriminator_width, hidden=hidden)
        super().__init__(
            frozen_copy(backbone),
            image_size=image_size,
            channels=channels,
            dim=dim,
            width=width,
            loss=loss,
            r1=r1,
            r1_every=r1_every,
            discriminator_lr=discriminator_lr,
        )
        self.encoder = nn.Sequential(backbone, nn.Linear(num_features(backbone), dim))
        self.to_code = frozen_copy(self.encoder[1])
        convert_batch_norm(self, SyncBatchNorm)
        self.average_generator = frozen_copy(self.generator)
        self.discriminator = Discriminator(
            dim, image_size=image_size, channels=channels, width=discriminator_width, hidden=hidden, unary=unary
        )
        self.momentum = momentum

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        self.first_look(images)
        prior = self.codes(images)
        codes, drawn = self.encoder(images), pixels(self.generator(prior))
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
        return {
            "loss": loss_d + loss_eg + penalty.get("r1", 0.0),
            "loss_d": loss_d,
            "loss_g": loss_eg,
            **penalty,
            "reconstruction": self.reconstruction_error(images, codes),
            "distance": distance(drawn, images),
        }

    @torch.no_grad()
    def reconstruction_error(self, images: Tensor, codes: Tensor) -> Tensor:
        """Return the root mean squared error between `images` x and G(E(x)), averaged over images; `codes` is E(x)."""
        drawn = pixels(call_on_buffer_copies(self.generator, codes))
        return (full_precision(drawn) - full_precision(images)).square().flatten(1).mean(1).sqrt().mean()

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
        return self.to_code(self.backbone(images))  # type: ignore[no-any-return]

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        drawn = pixels(self.average_generator(self.projection(images)))
        return {"reconstruction": [images, drawn], "samples": self.samples(self.average_generator, images)}

    def effective(self, batch_size: int) -> dict[str, Any]:
        return {"evaluated network": f"the average of the encoder, momentum {self.momentum}"}
