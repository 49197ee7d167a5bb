"""SimSiam: prediction of the embeddings of the other views, without negatives and without a momentum encoder.

Chen, He 2021       https://arxiv.org/abs/2011.10566   conf/method/simsiam.yaml
Pototzky et al. 2022 (FastSiam, more than two views)  https://doi.org/10.1007/978-3-031-16788-1_4

Shapes: N images per process, V views, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.errors import check_positive
from sslcli.methods.base import Batch, GroupOptions, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision


def simsiam_loss(predictions: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
    """Return the mean over views and images of -cos(p, z), in [-1, 1] (SimSiam eq. 2, FastSiam eq. 3).

    p is the prediction of one view, and z is the mean of the projections of all other views. `predictions` and
    `projections` contain one tensor (N, D) per view.
    """
    losses = []
    for view, prediction in enumerate(predictions):
        others = [full_precision(z) for number, z in enumerate(projections) if number != view]
        target = torch.stack(others).mean(0)
        losses.append(-F.cosine_similarity(full_precision(prediction), target, dim=1).mean())
    return torch.stack(losses).mean()


class SimSiam(Method):
    """Simple siamese network: a predictor and a stop-gradient prevent collapse.

    Args:
        dim: embedding size D.
        hidden: width of the hidden layers of the projector. None selects the width of the features, as in the official
            code.
        layers: number of linear layers of the projector: 3 in the official code, 2 on CIFAR-10 in the paper.
        predictor_hidden: width of the hidden layer of the predictor, a quarter of `dim` in the official code.
        num_views: number of views V. With more than two views, each prediction is compared with the mean projection of
            all other views, as in FastSiam.
        constant_predictor_lr: train the predictor with the peak learning rate throughout (`--fix-pred-lr`).
        predictor: False removes the predictor, as in an ablation of the paper. The embeddings then collapse.
        stop_gradient: False lets gradients flow through the targets, as in an ablation of the paper. The embeddings
            then collapse.
    """

    num_views = 2

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 2048,
        hidden: int | None = None,
        layers: int = 3,
        predictor_hidden: int = 512,
        num_views: int = 2,
        constant_predictor_lr: bool = True,
        predictor: bool = True,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__(backbone)
        if num_views < 2:
            raise ValueError(f"num_views is {num_views}, but each view is predicted from others: choose at least 2")
        width = num_features(backbone)
        hidden = width if hidden is None else hidden
        check_positive(layers=layers, hidden=hidden)
        self.projector = mlp([width, *([hidden] * (layers - 1)), dim], last_norm="plain")
        self.predictor = mlp([dim, predictor_hidden, dim], last_bias=True) if predictor else nn.Identity()
        convert_batch_norm(self, SyncBatchNorm)
        self.num_views = num_views
        self.constant_predictor_lr = constant_predictor_lr
        self.stop_gradient = stop_gradient

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z = [self.projection(view) for view in batch.views]  # V tensors (N, D)
        p = [self.predictor(projection) for projection in z]
        self.embeddings = tuple(projection.detach() for projection in z)
        return {"loss": simsiam_loss(p, self.embeddings if self.stop_gradient else z)}

    def projection(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]

    def group_options(self) -> dict[str, GroupOptions]:
        return {"predictor": {"constant_lr": True}} if self.constant_predictor_lr else {}

    def num_negatives(self, batch_size: int) -> int:
        return 0
