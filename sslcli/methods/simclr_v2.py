"""SimCLR v2: SimCLR with a deeper head, whose first layer is used for fine-tuning, and an optional MoCo queue.

Chen et al. 2020  https://arxiv.org/abs/2006.10029   conf/method/simclr_v2.yaml

This module implements the first of the three stages of SimCLR v2, pre-training. The second stage is fine-tuning, with
`ssl-eval protocol=semi` or `protocol=finetune`. The third stage is distillation, with `ssl-eval protocol=distill`.

Shapes: N images per process, W processes, D embedding size, K queue length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather
from sslcli.methods.base import Batch
from sslcli.methods.mixture import UnMix
from sslcli.methods.simclr import SimCLR, nt_xent
from sslcli.nn.contrastive import Contrast, check_momentum
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.modes import full_precision
from sslcli.nn.queue import enqueue_all


class SimCLRv2(SimCLR):
    """SimCLR with a three-layer head. Fine-tuning starts from the first layer of the head.

    Args:
        layers: number of linear layers of the head, 3 in v2.
        finetune_layer: layer of the head from which fine-tuning starts; 0 is the backbone.
        queue_size: number K of embeddings in the queue (sec. 2). They are computed by a momentum encoder and are
            additional negatives. 0 disables the queue and the momentum encoder.
        momentum: momentum of the momentum encoder.

    All other arguments are the same as for `SimCLR`.
    """

    queue: Tensor  # (K, D), oldest rows are overwritten first
    queue_head: Tensor  # scalar tensor: index of the next row to overwrite

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 128,
        hidden: int | None = None,
        layers: int = 3,
        norm: bool = True,
        init_std: float | None = None,
        temperature: float = 0.1,
        finetune_layer: int = 1,
        queue_size: int = 0,
        momentum: float = 0.999,
        mixture: UnMix | None = None,
    ) -> None:
        super().__init__(
            backbone,
            dim=dim,
            hidden=hidden,
            layers=layers,
            norm=norm,
            init_std=init_std,
            temperature=temperature,
            mixture=mixture,
        )
        check_momentum(momentum)
        if queue_size < 0:
            raise ValueError(f"queue_size is {queue_size}, but it must be at least 0; 0 disables the queue")
        if not 0 <= finetune_layer <= layers:
            raise ValueError(
                f"finetune_layer is {finetune_layer}, but the head has the layers 1 to {layers}; 0 is none"
            )
        self.head_layers = layers
        self.finetune_layer = finetune_layer
        self.queue_size, self.momentum = queue_size, momentum
        self.new_keys: list[Tensor] = []  # keys of this step's micro-batches; after_step enqueues them
        if queue_size:
            self.momentum_backbone = frozen_copy(self.backbone)
            self.momentum_head = frozen_copy(self.head)
            self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
            self.register_buffer("queue_head", torch.zeros((), dtype=torch.long))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        keys = [self.encode_keys(batch.views[1])] if self.queue_size else []  # (N, D)
        return (*super().embed(batch), *keys)

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        z1, z2, *keys = rows
        self.new_keys += [all_gather(part) for part in keys]  # (WN, D)
        return super().compare((z1, z2))

    def contrast(self, z1: Tensor, z2: Tensor) -> Contrast:
        """Return the NT-Xent loss of the embeddings (N, D) of two views, see `nt_xent`.

        If there is a queue, its rows are additional negatives of every anchor.
        """
        return nt_xent(z1, z2, temperature=self.temperature, memory=self.queue if self.queue_size else None)

    @torch.no_grad()
    def encode_keys(self, images: Tensor) -> Tensor:
        """Return unit embeddings of the momentum encoder: (N, C, H, W) -> (N, D)."""
        return F.normalize(full_precision(self.momentum_head(self.momentum_backbone(images))), dim=1)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        if not self.queue_size:
            return
        ema_update(self.momentum_backbone, self.backbone, self.momentum)
        ema_update(self.momentum_head, self.head, self.momentum)
        enqueue_all(self.queue, self.queue_head, self.new_keys)

    def head_features(self, images: Tensor, layer: int) -> Tensor:
        """Return the output of the head layer number `layer`: (N, C, H, W) -> (N, width of the layer).

        `layer` is 0 to the number of linear layers of the head. With 0, the result is the features of the backbone. The
        output of a hidden layer is taken after BatchNorm and ReLU. Raises ValueError for any other layer.
        """
        if not 0 <= layer <= self.head_layers:
            raise ValueError(
                f"layer is {layer}, but the head has the layers 1 to {self.head_layers}; 0 is the backbone"
            )
        ends = [place for place, part in enumerate(self.head) if isinstance(part, nn.ReLU)]
        stop = [0, *(place + 1 for place in ends), len(self.head)][layer]
        return self.head[:stop](self.features(images))  # type: ignore[no-any-return]

    @property
    def queue_length(self) -> int:
        return self.queue_size

    def num_negatives(self, batch_size: int) -> int:
        return 2 * batch_size - 2 + self.queue_size
