"""DINO: the student predicts the teacher's prototypes from other views of an image, with views of several sizes.

Caron et al. 2021  https://arxiv.org/abs/2104.14294   conf/method/dino.yaml

Official code: main_dino.py, utils.py and vision_transformer.py of facebookresearch/dino.

Shapes: V views, N images per process, W processes, K prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_reduce_mean
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, GroupOptions, Method, num_features
from sslcli.nn.assignments import summarize
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import check_momentum, check_temperature
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.modes import full_precision
from sslcli.nn.multi_crop import forward_by_size
from sslcli.nn.prototype_head import PrototypeHead
from sslcli.nn.schedule import ema_momentum, linear

NUM_GLOBAL = 2  # the teacher encodes the first two views


def cross_entropy_of_views(student: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """Return the mean cross-entropy of each target view i with each student view v != i (eq. 3), a scalar.

    `student` (V, N, K) are logits, and `target` (2, N, K) the probabilities of the first two views, without gradient.
    The mean is over images and over the 2 (V - 1) pairs of views.
    """
    log_probabilities = F.log_softmax(student / temperature, dim=2)
    all_views = log_probabilities.sum(0)
    pairs = [
        -(probabilities * (all_views - log_probabilities[i])).sum(1).mean() for i, probabilities in enumerate(target)
    ]
    return torch.stack(pairs).sum() / (len(target) * (len(student) - 1))


def centered(teacher: Tensor, center: Tensor, temperature: Tensor | float) -> Tensor:
    """Return the target probabilities of the teacher's logits: softmax of (logits - center) / temperature."""
    return F.softmax((teacher - center) / temperature, dim=-1)


def teacher_temperature_at(epoch: float, *, start: float, end: float, epochs: int) -> float:
    """Return the teacher temperature in `epoch`. It increases linearly from `start` during the first `epochs` epochs.

    The temperature is constant in an epoch, and the last epoch of the increase has the temperature `end`. With a single
    epoch, this epoch has the temperature `start`, as in the official code.
    """
    if epochs == 1 and epoch < 1:
        return start
    return linear(int(epoch), start=start, end=end, length=epochs - 1)


class DINO(Method):
    """Self-distillation without labels. The teacher is a moving average of the student.

    Args:
        num_prototypes: number of prototypes K.
        dim: width of the bottleneck before the prototypes.
        hidden: width of the hidden layers of the head.
        layers: number of linear layers of the head before the prototypes.
        norm: use BatchNorm in the head.
        num_views: number of views V. The teacher encodes the first two, which must have the same size.
        trained_gain: train the lengths of the prototypes (`--norm_last_layer false`).
        freeze_last_layer_epochs: number of epochs at the start in which the prototypes are not trained.
        momentum: initial momentum of the teacher. Small batches need a larger one: 0.9995 for 256 images.
        final_momentum: momentum at the end of the run. The momentum increases to it with a cosine schedule.
        temperature: divisor of the student's logits.
        teacher_temperature: divisor of the teacher's logits after the warm-up.
        warmup_teacher_temperature: divisor of the teacher's logits in the first epoch.
        warmup_teacher_temperature_epochs: number of epochs in which the divisor increases.
        center_momentum: momentum of the center, the moving average of the teacher's logits.
        centering: False keeps the center at 0, as in an ablation of the paper. The embeddings may then collapse.
    """

    num_views = 2
    evaluated_part = "teacher_backbone"
    decreasing_metric = "divergence"  # the loss contains the entropy of the target, which need not decrease
    center: Tensor  # (K,)
    current_teacher_temperature: Tensor  # scalar

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_prototypes: int = 65536,
        dim: int = 256,
        hidden: int = 2048,
        layers: int = 3,
        norm: bool = False,
        num_views: int = 10,
        trained_gain: bool = False,
        freeze_last_layer_epochs: float = 1,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_temperature_epochs: int = 0,
        center_momentum: float = 0.9,
        centering: bool = True,
    ) -> None:
        super().__init__(backbone)
        check_positive(num_prototypes=num_prototypes, dim=dim, hidden=hidden, layers=layers)
        check_momentum(momentum, final_momentum)
        check_momentum(center_momentum)
        for value in (temperature, teacher_temperature, warmup_teacher_temperature):
            check_temperature(value)
        if num_views < NUM_GLOBAL:
            raise ValueError(f"num_views is {num_views}, but the teacher encodes two views: choose at least 2")
        if freeze_last_layer_epochs < 0 or warmup_teacher_temperature_epochs < 0:
            raise ValueError(
                f"freeze_last_layer_epochs is {freeze_last_layer_epochs} and warmup_teacher_temperature_epochs is "
                f"{warmup_teacher_temperature_epochs}, but neither can be negative"
            )
        self.head = PrototypeHead(
            num_features(backbone),
            hidden=hidden,
            dim=dim,
            num_prototypes=num_prototypes,
            layers=layers,
            norm=norm,
            trained_gain=trained_gain,
        )
        convert_batch_norm(self, SyncBatchNorm)
        self.teacher_backbone = frozen_copy(self.backbone)
        self.teacher_head = frozen_copy(self.head)
        self.num_views = num_views
        self.freeze_last_layer_epochs = freeze_last_layer_epochs
        self.momentum, self.final_momentum = momentum, final_momentum
        self.temperature = temperature
        self.temperatures = (warmup_teacher_temperature, teacher_temperature, warmup_teacher_temperature_epochs)
        self.center_momentum = center_momentum
        self.centering = centering
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("current_teacher_temperature", torch.tensor(0.0))
        self.new_centers: list[Tensor] = []  # mean logits of this step's micro-batches; after_step averages them
        DINO.before_step(self, 0.0, 0.0)

    def before_step(self, progress: float, epoch: float) -> None:
        start, end, epochs = self.temperatures
        self.current_teacher_temperature.fill_(teacher_temperature_at(epoch, start=start, end=end, epochs=epochs))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views = batch.views
        teacher = self.teacher_logits(views[:NUM_GLOBAL])  # (2, N, K)
        bottleneck = self.head.bottleneck(forward_by_size(self.backbone, views))
        student = full_precision(self.head.last_layer(bottleneck)).view(len(views), len(views[0]), -1)  # (V, N, K)
        target = centered(teacher, self.center, self.current_teacher_temperature)
        self.embeddings = tuple(bottleneck.detach().view(len(views), len(views[0]), -1)[:NUM_GLOBAL])
        self.new_centers.append(all_reduce_mean(teacher.mean((0, 1))))
        loss = cross_entropy_of_views(student, target, temperature=self.temperature)
        self.assignments = summarize(target)
        entropy = self.assignments.entropy
        return {"loss": loss, "teacher_entropy": entropy, "divergence": loss.detach() - entropy}

    def check_views(self, views: list[Tensor]) -> None:
        first, second = (tuple(view.shape[2:]) for view in views[:NUM_GLOBAL])
        if first != second:
            raise ValueError(f"the first two views have {first} and {second} pixels, but DINO needs one size for both")

    @torch.no_grad()
    def teacher_logits(self, views: list[Tensor]) -> Tensor:
        """Return the teacher's logits in full precision: V views (N, C, H, W) -> (V, N, K)."""
        logits = self.teacher_head(forward_by_size(self.teacher_backbone, views))
        return full_precision(logits).view(len(views), len(views[0]), -1)

    def scheduled(self, progress: float) -> dict[str, float]:
        return {"EMA momentum": ema_momentum(progress, base=self.momentum, final=self.final_momentum)}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = self.scheduled(progress)["EMA momentum"]
        ema_update(self.teacher_backbone, self.backbone, momentum)
        ema_update(self.teacher_head, self.head, momentum)
        if self.centering:
            self.center.lerp_(torch.stack(self.new_centers).mean(0).to(self.center.dtype), 1 - self.center_momentum)
        self.new_centers.clear()

    def group_options(self) -> dict[str, GroupOptions]:
        return {"head.last_layer": {"frozen_epochs": self.freeze_last_layer_epochs}}

    def projection(self, images: Tensor) -> Tensor:
        return self.teacher_head.bottleneck(self.teacher_backbone(images))  # type: ignore[no-any-return]

    def num_negatives(self, batch_size: int) -> int:
        return 0
