"""MoCo v1 and v2: contrast with a queue of keys from a momentum encoder.

v1  He et al. 2020    https://arxiv.org/abs/1911.05722   conf/method/moco.yaml
v2  Chen et al. 2020  https://arxiv.org/abs/2003.04297   conf/method/moco_v2.yaml (MLP head, stronger views)

Shapes: N images per process, W processes, D embedding size, K queue length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.batch_shuffle import shuffled
from sslcli.distributed.collectives import all_gather
from sslcli.methods.base import Batch, Method, num_features
from sslcli.methods.mixture import UnMix, add_mixture
from sslcli.nn.batch_norm import SplitBatchNorm, SyncBatchNorm, average_statistics, convert_batch_norm
from sslcli.nn.contrastive import Contrast, check_momentum, check_temperature, info_nce
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision
from sslcli.nn.queue import enqueue_all
from sslcli.nn.schedule import ema_momentum


def projection_head(width: int, dim: int, *, mlp_head: bool, hidden: int | None) -> nn.Sequential:
    """Return the head of v1 (one linear layer) or of v2 (`mlp_head`, with one hidden layer): (N, width) -> (N, dim).

    `hidden` is the width of the hidden layer; None = `width`. Raises ValueError if `hidden` is below 1, or if it is set
    although `mlp_head` is False.
    """
    if hidden is not None and not mlp_head:
        raise ValueError(f"hidden is {hidden}, but a linear head has no hidden layer: set mlp_head=true or hidden=null")
    if hidden is not None and hidden < 1:
        raise ValueError(f"hidden is {hidden}, but the hidden layer of the head must have at least one unit")
    return mlp([width, *([hidden or width] if mlp_head else []), dim], norm=False, bias=True, last_bias=True)


class MoCo(Method):
    """Momentum contrast with a queue and shuffling BatchNorm.

    Args:
        dim: embedding size D.
        queue_size: number K of keys in the queue of negatives.
        momentum: momentum of the momentum encoder, which computes the keys.
        final_momentum: momentum at the end of the run. The momentum increases to it with a cosine schedule, as in MoCo
            v2+ of solo-learn. None keeps the momentum constant, as in the official code.
        temperature: divisor of the cosine similarities.
        mlp_head: use v2's head, which has one hidden layer, instead of one linear layer.
        hidden: width of the hidden layer of v2's head. None selects the width of the features, as in the official code.
        symmetric: also use view 2 as the query and view 1 as the key. The loss is the mean of both directions.
        bn_group: number of images that BatchNorm normalizes together. Keys are shuffled before they are grouped
            (sec. 3.3). Without the shuffling, batch statistics could identify the key of a query. 32 is the batch size
            per GPU in the paper, which uses 8 GPUs. None normalizes the images of all processes together, as solo-learn
            does. The shuffling then has no effect.
        mixture: an `UnMix` that mixes the first views of different images; None adds no mixtures. The mixtures are
            additional queries. They are never enqueued as keys.
    """

    num_views = 2
    queue: Tensor  # (K, D), oldest rows are overwritten first
    queue_head: Tensor  # scalar tensor: index of the next row to overwrite

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        final_momentum: float | None = None,
        temperature: float = 0.07,
        mlp_head: bool = False,
        hidden: int | None = None,
        symmetric: bool = False,
        bn_group: int | None = 32,
        mixture: UnMix | None = None,
    ) -> None:
        super().__init__(backbone)
        check_temperature(temperature)
        check_momentum(momentum, final_momentum)
        if queue_size < 1:
            raise ValueError(f"queue_size is {queue_size}, but the queue must hold at least one key")
        if bn_group is not None and bn_group < 2:
            raise ValueError(f"bn_group is {bn_group}, but BatchNorm needs at least 2 images to normalize together")
        self.head = projection_head(num_features(backbone), dim, mlp_head=mlp_head, hidden=hidden)
        for part in convert_batch_norm(self, SyncBatchNorm if bn_group is None else SplitBatchNorm).modules():
            if isinstance(part, SplitBatchNorm) and bn_group is not None:
                part.group = bn_group
        self.momentum_backbone = frozen_copy(self.backbone)
        self.momentum_head = frozen_copy(self.head)
        self.momentum = momentum
        self.final_momentum = final_momentum
        self.temperature = temperature
        self.symmetric = symmetric
        self.mixture = mixture
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("queue_head", torch.zeros((), dtype=torch.long))
        # Number of shuffles so far, which determines the order of the next shuffle. It is a tensor, because a compiled
        # step would be compiled again if a Python number changed. It stays on the CPU, where the order is drawn.
        self.draws = torch.zeros((), dtype=torch.int64, device="cpu")
        self.new_keys: list[Tensor] = []  # keys of this step's micro-batches; after_step enqueues them

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x1, x2 = batch.views
        q1, k2 = self.query(x1), self.encode_keys(x2)  # (N, D)
        loss, accuracy = self.contrast(q1, k2)
        self.embeddings = (q1.detach(), k2)
        keys = [k2]
        if self.symmetric:
            q2, k1 = self.query(x2), self.encode_keys(x1)
            other = self.contrast(q2, k1)
            loss, accuracy = (loss + other.loss) / 2, (accuracy + other.accuracy) / 2
            keys = [k1, k2]
        self.new_keys.append(torch.cat([all_gather(k) for k in keys]))  # (WN or 2WN, D), view 1 first
        return add_mixture(
            self.mixture,
            {"loss": loss, "accuracy": accuracy},
            x1,
            query=self.query,
            compare=lambda q: torch.stack([self.contrast(q, k).loss for k in keys]).mean(),
        )

    def query(self, images: Tensor) -> Tensor:
        """Return unit queries: (N, C, H, W) -> (N, D)."""
        return F.normalize(full_precision(self.projection(images)), dim=1)

    def contrast(self, query: Tensor, key: Tensor) -> Contrast:
        return info_nce(query, key, self.queue, temperature=self.temperature)

    @torch.no_grad()
    def encode_keys(self, images: Tensor) -> Tensor:
        """Return keys of length 1: (N, C, H, W) -> (N, D).

        The images of all processes are shuffled before they are encoded (MoCo v1, section 3.3). BatchNorm therefore
        normalizes the key of an image together with other images than its query.
        """
        keys = self.momentum_head(self.momentum_backbone(shuffled(images, self.draws)))
        keys = shuffled(F.normalize(full_precision(keys), dim=1), self.draws, restore=True)
        self.draws += 1
        return keys

    def scheduled(self, progress: float) -> dict[str, float]:
        if self.final_momentum is None:
            return {}
        return {"EMA momentum": ema_momentum(progress, base=self.momentum, final=self.final_momentum)}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = self.scheduled(progress).get("EMA momentum", self.momentum)
        ema_update(self.momentum_backbone, self.backbone, momentum)
        ema_update(self.momentum_head, self.head, momentum)
        enqueue_all(self.queue, self.queue_head, self.new_keys)
        average_statistics(self)

    def get_extra_state(self) -> Tensor:
        return self.draws.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.draws.fill_(int(state))

    def projection(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))  # type: ignore[no-any-return]

    @property
    def queue_length(self) -> int:
        return len(self.queue)

    def num_negatives(self, batch_size: int) -> int:
        return len(self.queue)

    def effective(self, batch_size: int) -> dict[str, Any]:
        return super().effective(batch_size) | {"images per BatchNorm group": self.groups(batch_size)}

    def groups(self, batch_size: int) -> str:
        if any(isinstance(part, SyncBatchNorm) for part in self.backbone.modules()):
            return f"{batch_size} (all)"
        norms = [part for part in self.backbone.modules() if isinstance(part, SplitBatchNorm)]
        if not norms:
            return "no BatchNorm"
        return str(batch_size // norms[0].num_groups(batch_size))
