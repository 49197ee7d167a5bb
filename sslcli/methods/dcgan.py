"""DCGAN: the discriminator of a generative game is the representation, its maps pooled at every scale.

Radford et al. 2016  https://arxiv.org/abs/1511.06434  https://github.com/Newmu/dcgan_code  conf/method/dcgan.yaml

Shapes: N images a process, C channels, S their side in pixels.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.errors import check_positive
from sslcli.methods.base import Batch, maps_of, num_features
from sslcli.methods.gan import Game, aside, deceiver_loss, discriminator_loss, distance, pixels
from sslcli.nn import SyncBatchNorm, convert_batch_norm, evaluating

INIT_STD = 0.02  # of all weights (section 4)


def pooled_maps(maps: dict[str, Tensor], side: int) -> Tensor:
    """Maps (N, channels, height, width) by stage -> (N, F): each max-pooled to `side` x `side` places, or left with
    fewer where it has no more, all in one row (svhn/svhn_semisup_analysis.py of the official code), of length 1.
    """
    pooled = [F.adaptive_max_pool2d(m, (min(side, m.shape[2]), min(side, m.shape[3]))) for m in maps.values()]
    return F.normalize(torch.cat([part.flatten(1) for part in pooled], 1), dim=1)


class DCGAN(Game):
    """The backbone and a linear layer are the discriminator; features are its maps by stage, pooled.

    Real and drawn images pass the discriminator in batches of their own, and the running statistics of its BatchNorm
    are those of real images alone, which is what features are taken of.

    Args:
        image_size, channels, dim, width, loss, r1, r1_every, discriminator_lr: see `Game`.
        pool: places a side to which each map is pooled for the features.

    Raises ValueError for values outside these and for a backbone without maps by stage.
    """

    falling = "distance"
    discriminator_parts = ("backbone", "to_logit")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        dim: int = 100,
        width: int = 512,
        loss: Literal["logistic", "hinge"] = "logistic",
        r1: float = 0.0,
        r1_every: int = 16,
        discriminator_lr: float = 1.0,
        pool: int = 4,
    ) -> None:
        check_positive(pool=pool)
        maps_of(backbone, torch.zeros(2, channels, image_size, image_size))  # what features are taken from
        super().__init__(
            backbone,
            image_size=image_size,
            channels=channels,
            dim=dim,
            width=width,
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

        # The discriminator's own loss: it learns, the generator does not.
        features = self.backbone(images)
        real = self.to_logit(features)
        fake = self.to_logit(aside(self.backbone, drawn.detach(), learn=True))
        loss_d = discriminator_loss(real, fake, kind=self.loss)
        penalty = self.penalty(self.judgement, images)

        # The generator's: the discriminator is a constant.
        loss_g = deceiver_loss(aside(self.to_logit, aside(self.backbone, drawn)), kind=self.loss)
        self.embeddings = (features.detach(),)
        return {
            "loss": loss_d + loss_g + penalty.get("r1", 0.0),
            "loss_d": loss_d,
            "loss_g": loss_g,
            **penalty,
            "distance": distance(drawn, images),
        }

    def judgement(self, images: Tensor) -> Tensor:
        """Logits (N, 1) by running statistics, so that no image's logit depends on another image."""
        with evaluating(self.backbone):
            return self.to_logit(self.backbone(images))  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, F), rows of length 1: pool^2 values of every channel of every stage."""
        return pooled_maps(self.backbone.stages(images), self.pool)  # type: ignore[operator]

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        return {"samples": self.samples(self.generator, images)}

    def effective(self, batch_size: int) -> dict[str, Any]:
        return {"features": f"every stage, max-pooled to {self.pool} x {self.pool} places"}


def start(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02), scales of BatchNorm from N(1, 0.02) (section 4 and the official code)."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(part.weight, std=INIT_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, INIT_STD)
