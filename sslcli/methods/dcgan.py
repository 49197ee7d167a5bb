"""DCGAN: a GAN whose discriminator contains the backbone. The features are the pooled feature maps of all stages.

Radford et al. 2016  https://arxiv.org/abs/1511.06434  https://github.com/Newmu/dcgan_code  conf/method/dcgan.yaml

Shapes: N images per process, C channels, S image side in pixels, F number of features.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.errors import check_positive
from sslcli.methods.base import Batch, maps_of, num_features
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
from sslcli.nn.modes import evaluating

INIT_STD = 0.02  # initial standard deviation of all weights (section 4)


def pooled_maps(maps: dict[str, Tensor], side: int) -> Tensor:
    """Return one feature vector per image: the feature maps of all stages, max-pooled, concatenated and L2-normalized.

    `maps` contains one map (N, channels, height, width) per stage. The result is (N, number of pooled values). Each map
    is pooled to at most `side` x `side` positions, as in svhn/svhn_semisup_analysis.py of the official code.
    """
    pooled = [F.adaptive_max_pool2d(m, (min(side, m.shape[2]), min(side, m.shape[3]))) for m in maps.values()]
    return F.normalize(torch.cat([part.flatten(1) for part in pooled], 1), dim=1)


class DCGAN(Game):
    """GAN whose discriminator is the backbone plus a linear layer. The features are pooled maps of all stages.

    The discriminator processes real and generated images in separate batches. Only real images update the
    running statistics of BatchNorm in the discriminator, because features are computed from real images.

    Args:
        image_size, channels, dim, prior, loss, r1, r1_every, discriminator_lr: see `Game`.
        width: channels of the generator's first feature map, which has the smallest side.
        pool: maximum side of the pooled feature maps.

    Raises ValueError if an argument is out of range, or if the backbone has no `stages`.
    """

    decreasing_metric = "distance"
    discriminator_parts = ("backbone", "to_logit")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        dim: int = 100,
        width: int = 512,
        prior: Literal["normal", "uniform"] = "normal",
        loss: Literal["logistic", "hinge"] = "logistic",
        r1: float = 0.0,
        r1_every: int = 16,
        discriminator_lr: float = 1.0,
        pool: int = 4,
    ) -> None:
        check_positive(pool=pool)
        maps_of(backbone, torch.zeros(2, channels, image_size, image_size))  # raises if there are no maps
        super().__init__(
            backbone,
            generator=decoder_generator(dim, image_size=image_size, channels=channels, width=width),
            image_size=image_size,
            channels=channels,
            dim=dim,
            prior=prior,
            loss=loss,
            r1=r1,
            r1_every=r1_every,
            discriminator_lr=discriminator_lr,
        )
        self.to_logit = nn.Linear(num_features(backbone), 1)
        start(self.generator)
        start(self.to_logit)
        convert_batch_norm(self, SyncBatchNorm)
        self.pool = pool

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        self.first_look(images)
        drawn = pixels(self.generator(self.codes(images)))

        # Discriminator loss: the generator gets no gradient.
        features = self.backbone(images)
        real = self.to_logit(features)
        fake = self.to_logit(call_on_buffer_copies(self.backbone, drawn.detach(), learn=True))
        loss_d = discriminator_loss(real, fake, kind=self.loss)
        penalty = self.penalty(self.logits, images)

        # Generator loss: the discriminator gets no gradient.
        loss_g = generator_loss(
            call_on_buffer_copies(self.to_logit, call_on_buffer_copies(self.backbone, drawn)), kind=self.loss
        )
        self.embeddings = (features.detach(),)
        return {
            "loss": loss_d + loss_g + penalty.get("r1", 0.0),
            "loss_d": loss_d,
            "loss_g": loss_g,
            **penalty,
            "distance": distance(drawn, images),
        }

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (N, 1). BatchNorm is in evaluation mode, so each logit depends only on its own image."""
        with evaluating(self.backbone):
            return self.to_logit(self.backbone(images))  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> Tensor:
        """Return F features of norm 1: (N, C, S, S) -> (N, F).

        The map of each stage of the backbone is max-pooled to at most `pool` x `pool` positions. The features are the
        values of all pooled maps.
        """
        return pooled_maps(self.backbone.stages(images), self.pool)  # type: ignore[operator]

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        return {"samples": self.samples(self.generator, images)}

    def effective(self, batch_size: int) -> dict[str, Any]:
        return {"features": f"every stage, max-pooled to {self.pool} x {self.pool} places"}


def start(module: nn.Module) -> None:
    """Initialize convolutions, linear layers and BatchNorm scales as in the paper (section 4) and the official code.

    Weights have mean 0 and standard deviation 0.02. BatchNorm scales have mean 1 and standard deviation 0.02. Biases of
    convolutions and linear layers are 0.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(part.weight, std=INIT_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, INIT_STD)
