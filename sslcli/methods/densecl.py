"""DenseCL: MoCo v2, and the same contrast between matching places of two views.

Wang et al. 2021  https://arxiv.org/abs/2011.09157   conf/method/densecl.yaml

Official code: openselfsup/models/densecl.py of WXinlong/DenseCL.

Shapes: N images per process, W processes, C channels and P places of the last feature map, D embedding size, K queue
length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.batch_shuffle import shuffled
from sslcli.distributed.collectives import all_gather
from sslcli.methods.base import Batch, maps_of
from sslcli.methods.moco import MoCo
from sslcli.nn.contrastive import Contrast, info_nce
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.modes import evaluating, full_precision
from sslcli.nn.queue import enqueue_all


@torch.no_grad()
def matching_places(query_map: Tensor, key_map: Tensor) -> Tensor:
    """Return, for each place of the query's map, the place of the key's map with the most similar feature (eq. 4).

    The maps of the backbone are (N, C, P). The similarity is the cosine. The result is (N, P) int64.
    """
    query, key = (F.normalize(full_precision(values), dim=1) for values in (query_map, key_map))
    return (query.transpose(1, 2) @ key).argmax(2)


def dense_contrast(query: Tensor, key: Tensor, match: Tensor, queue: Tensor, *, temperature: float) -> Contrast:
    """Return the contrastive loss of all places, averaged over images and places (eq. 2).

    Args:
        query: (N, D, P), embeddings of the places of the query view. They are normalized in this function.
        key: (N, D, P), embeddings of the places of the key view, without gradient. They are normalized as well.
        match: (N, P) int64, the place of the key view that is the positive of each place of the query view.
        queue: (K, D), unit rows. They are the negatives of all places.
        temperature: divisor of the cosine similarities.
    """
    query, key = (F.normalize(full_precision(values), dim=1) for values in (query, key))
    positive = key.gather(2, match[:, None].expand_as(query))
    query, positive = (values.transpose(1, 2).flatten(0, 1) for values in (query, positive))  # (N P, D)
    return info_nce(query, positive, queue, temperature=temperature)


def last_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the last feature map of a backbone: (N, C, H, W) -> (N, C, h, w)."""
    maps = list(backbone.stages(images).values())  # type: ignore[operator]
    return maps[-1]  # type: ignore[no-any-return]


class DenseCL(MoCo):
    """Dense contrastive learning.

    Args:
        image_size: side of the training images in pixels. `ssl-train` sets it.
        channels: number of channels of the images. `ssl-train` sets it.
        dim: embedding size D of both heads.
        hidden: width of the hidden layers of both heads. None selects the width of the features.
        queue_size: number K of keys in each of the two queues.
        momentum: momentum of the momentum encoder, which computes the keys.
        temperature: divisor of the cosine similarities.
        dense_weight: lambda, the weight of the dense loss in [0, 1]. The weight of the loss of whole images is 1 -
            lambda.
        bn_group: number of images that BatchNorm normalizes together, see `MoCo`.

    Raises ValueError if the features of the backbone are not the mean of its last feature map.
    """

    dense_queue: Tensor  # (K, D), unit rows; oldest rows are overwritten first
    dense_queue_head: Tensor  # scalar tensor: index of the next row to overwrite

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        dim: int = 128,
        hidden: int | None = None,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        dense_weight: float = 0.5,
        bn_group: int | None = 32,
    ) -> None:
        width = check_map(backbone, image_size, channels)
        super().__init__(
            backbone,
            dim=dim,
            queue_size=queue_size,
            momentum=momentum,
            temperature=temperature,
            mlp_head=True,
            hidden=hidden,
            bn_group=bn_group,
        )
        if not 0 <= dense_weight <= 1:
            raise ValueError(f"dense_weight is {dense_weight}, but the losses have the weights 1 - dense_weight and it")
        inner = hidden or width
        self.dense_head = nn.Sequential(nn.Conv2d(width, inner, 1), nn.ReLU(), nn.Conv2d(inner, dim, 1))
        self.momentum_dense_head = frozen_copy(self.dense_head)
        self.dense_weight = dense_weight
        self.register_buffer("dense_queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("dense_queue_head", torch.zeros((), dtype=torch.long))
        self.new_dense_keys: list[Tensor] = []  # keys of this step's micro-batches; after_step enqueues them

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x1, x2 = batch.views
        query_map = last_map(self.backbone, x1)  # (N, C, h, w)
        query = F.normalize(full_precision(self.head(query_map.mean((2, 3)))), dim=1)  # (N, D)
        key, key_places, key_map = self.encode_places(x2)
        whole = self.contrast(query, key)
        match = matching_places(query_map.flatten(2), key_map)
        query_places = self.dense_head(query_map).flatten(2)  # (N, D, P)
        dense = dense_contrast(query_places, key_places, match, self.dense_queue, temperature=self.temperature)
        self.embeddings = (query.detach(), key)
        self.new_keys.append(all_gather(key))
        self.new_dense_keys.append(all_gather(F.normalize(key_places.mean(2), dim=1)))
        return {
            "loss": (1 - self.dense_weight) * whole.loss + self.dense_weight * dense.loss,
            "accuracy": whole.accuracy,
            "dense_loss": dense.loss,
            "dense_accuracy": dense.accuracy,
        }

    @torch.no_grad()
    def encode_places(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit keys (N, D), keys of all places (N, D, P), and the backbone's map (N, C, P) of images.

        The images of all processes are shuffled before they are encoded, see `MoCo.encode_keys`.
        """
        maps = last_map(self.momentum_backbone, shuffled(images, self.draws))
        keys = F.normalize(full_precision(self.momentum_head(maps.mean((2, 3)))), dim=1)
        places = full_precision(self.momentum_dense_head(maps)).flatten(2)
        found = (keys, places, full_precision(maps).flatten(2))
        sizes = [values[0].numel() for values in found]
        rows = torch.cat([values.flatten(1) for values in found], dim=1)  # one exchange between processes for all
        parts = torch.split(shuffled(rows, self.draws, restore=True), sizes, dim=1)
        self.draws += 1
        keys, places, maps = (part.reshape(values.shape) for part, values in zip(parts, found, strict=True))
        return keys, places, maps

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        ema_update(self.momentum_dense_head, self.dense_head, self.momentum)
        enqueue_all(self.dense_queue, self.dense_queue_head, self.new_dense_keys)


def check_map(backbone: nn.Module, image_size: int, channels: int) -> int:
    """Return the number of channels of the backbone's last map.

    Raises ValueError if the features of the backbone are not the mean of this map.
    """
    images = torch.linspace(-1, 1, 2 * channels * image_size**2).view(2, channels, image_size, image_size)
    final = list(maps_of(backbone, images).values())[-1]
    with evaluating(backbone), torch.no_grad():
        features = backbone(images)
    mean = final.mean((2, 3))
    if features.shape != mean.shape or not torch.allclose(features, mean, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"the features of the backbone {type(backbone).__name__} are not the mean of its last feature map, which "
            "DenseCL contrasts: choose a resnet or small backbone, or pool=mean with a vit"
        )
    return int(final.shape[1])
