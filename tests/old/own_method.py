"""A method and an image set of a user, written for version 0.1: its imports are the public ones of that version."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.data.decode import decode, open_file
from sslcli.data.files import Flat, Folder, ListFile
from sslcli.data.hf import Hf
from sslcli.distributed import all_gather, all_gather_with_grad, is_main, rank, world_size
from sslcli.evaluate.base import Protocol
from sslcli.evaluate.knn import Knn, knn
from sslcli.losses import check_temperature, cosine_distance, info_nce
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn import ema_update, frozen_copy, full_precision, mlp
from sslcli.noise import Noise
from sslcli.schedule import ema_momentum, warmup_cosine

IMPORTED = (decode, open_file, Flat, ListFile, Hf, all_gather, is_main, rank, world_size, knn, cosine_distance)


class OwnFolder(Folder):
    """Class folders with a name of the user."""


class OwnKnn(Knn):
    """The protocol of the commands under a name of the user."""


class OwnMethod(Method):
    """InfoNCE between two views with a momentum encoder and noise on the embeddings."""

    num_views = 2

    def __init__(self, backbone: nn.Module, *, dim: int, temperature: float, momentum: float) -> None:
        super().__init__(backbone)
        check_temperature(temperature)
        width = num_features(backbone)
        self.head = mlp([width, width, dim])
        self.momentum_backbone, self.momentum_head = frozen_copy(backbone), frozen_copy(self.head)
        self.noise = Noise()
        self.temperature, self.momentum = temperature, momentum

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch.views
        queries = F.normalize(full_precision(self.projection(first)), dim=1)
        with torch.no_grad():
            keys = F.normalize(full_precision(self.momentum_head(self.momentum_backbone(second))), dim=1)
        self.embeddings = (queries.detach(), keys)
        noisy = F.normalize(queries + 0.01 * self.noise.normal(*queries.shape, device=queries.device), dim=1)
        found = info_nce(noisy, keys, all_gather_with_grad(keys), temperature=self.temperature)
        return {"loss": found.loss, "rate": torch.tensor(warmup_cosine(1, total=10))}

    def after_step(self, progress: float) -> None:
        momentum = ema_momentum(progress, base=self.momentum)
        ema_update(self.momentum_backbone, self.backbone, momentum)
        ema_update(self.momentum_head, self.head, momentum)

    def projection(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


assert issubclass(OwnKnn, Protocol)
