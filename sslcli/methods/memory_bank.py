"""Instance discrimination with a memory bank: each image is a class, represented by the image's past embedding.

Wu et al. 2018  https://arxiv.org/abs/1805.01978   conf/method/memory_bank.yaml

Shapes: N images per process, n training images, D embedding size, K noise rows (random rows of the bank) per image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.methods.bank import Bank, log_normalizer, nce, own_row_wins, sampled_softmax, scores
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import check_temperature, info_nce
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise

LOSSES = ("full", "nce", "softmax")


class MemoryBank(Method):
    """Instance discrimination: compare each image with a bank that holds past embeddings of all training images.

    The bank has one row per training image. Equations are those of the paper (arXiv:1805.01978).

    Args:
        num_images: number of training images n; `ssl-train` sets this argument.
        dim: embedding size D.
        loss: "full" is the cross-entropy over all n rows (eq. 2). "nce" is noise-contrastive estimation with K noise
            rows (eq. 7). "softmax" is the cross-entropy over the image's own row and K noise rows, as in the later
            release of the official code.
        negatives: number K of noise rows, which are random rows of the bank. They are drawn uniformly with replacement
            and may include the image's own row. Unused with loss="full".
        momentum: weight of the old row in an update; 0.5 in the official code.
        temperature: divisor of the similarities.
        proximal: weight of the squared distance between an embedding and the row of its image (eq. 10). The official
            code uses momentum instead.
        head_norm: add BatchNorm without affine parameters after the head. This removes the common mean of all
            embeddings. The paper has no such BatchNorm.
        fill: if True, start with an empty bank. The first embedding of an image becomes its row, and the image
            contributes 0 to the loss in this step. The first epoch therefore fills the bank with embeddings of the
            initial network. If False, start with random rows, as in the official code.

    Raises ValueError if an argument is out of range.
    """

    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_images: int,
        dim: int = 128,
        loss: str = "nce",
        negatives: int = 4096,
        momentum: float = 0.5,
        temperature: float = 0.07,
        proximal: float = 0.0,
        head_norm: bool = False,
        fill: bool = False,
    ) -> None:
        super().__init__(backbone)
        check_temperature(temperature)
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}, but it must be one of: {', '.join(LOSSES)}")
        if negatives < 1:
            raise ValueError(f"negatives is {negatives}, but must be at least 1; loss=full uses all rows")
        if proximal < 0:
            raise ValueError(f"proximal is {proximal}, but it is the weight of a distance, so it must be at least 0")
        self.bank = Bank(num_images, dim, momentum=momentum, empty=fill)
        self.head = nn.Linear(num_features(backbone), dim, bias=not head_norm)
        self.norm = nn.BatchNorm1d(dim, affine=False) if head_norm else nn.Identity()
        convert_batch_norm(self, SyncBatchNorm)
        self.noise = Noise()
        self.loss, self.negatives, self.temperature, self.proximal = loss, negatives, temperature, proximal
        self.fill = fill
        self.log_z: float | None = None  # log of the normalizer Z of "nce"; constant after the first batch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z = self.projection(batch.views[0])
        with torch.autocast(z.device.type, enabled=False):
            v = F.normalize(full_precision(z), dim=1)  # (N, D)
            scalars = self.contrast(v, batch.index)
            if self.proximal:
                distance = (v - self.bank.rows[batch.index]).square().sum(1) * self.bank.known(batch.index)
                scalars["loss"] = scalars["loss"] + self.proximal * distance.mean()
        self.bank.remember(batch.index, v)
        self.embeddings = (v.detach(),)
        return scalars

    def contrast(self, v: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Return loss and accuracy for unit embeddings `v` (N, D) of N images.

        `index` (N,) contains the positions of these images in the training split.

        Accuracy is the fraction of images whose own row of the bank has the largest logit. Loss and accuracy are means
        over all N images. An image whose row is still empty contributes 0.
        """
        num_images, known = len(self.bank.rows), self.bank.known(index)
        if self.loss == "full":
            rows, present = self.bank.rows, known if self.fill else None
            own = info_nce(v, rows[index], rows, exclude=index[:, None], present=present, temperature=self.temperature)
            return {"loss": own.loss, "accuracy": own.accuracy}
        others = self.noise.integers(num_images, len(v), self.negatives, device=v.device)
        chosen = torch.cat([index[:, None], others], dim=1)  # (N, K + 1)
        logits = scores(v, self.bank.rows, chosen, temperature=self.temperature)
        accuracy = (own_row_wins(logits, chosen) * known).mean()
        if self.loss == "softmax":
            return {"loss": (sampled_softmax(logits) * known).mean(), "accuracy": accuracy}
        if self.log_z is None:
            self.log_z = log_normalizer(logits, num_images, known)
        if self.log_z is None:  # no image of any process has a row
            return {"loss": 0 * v.sum(), "accuracy": accuracy}
        losses = nce(logits, log_z=self.log_z, num_images=num_images)
        return {"loss": (losses * known).mean(), "accuracy": accuracy}

    def after_step(self, progress: float) -> None:
        self.bank.update()

    def projection(self, images: Tensor) -> Tensor:
        return self.norm(self.head(self.backbone(images)))  # type: ignore[no-any-return]

    def stored(self) -> Tensor:
        """Return the bank rows (n, D), in the order of the training split.

        Rows have unit norm. For k-NN on these rows, the queries are outputs of `projection`. The accuracy of this k-NN
        differs from that of k-NN on the usual features of unaugmented images. The reason is that each row is a moving
        average of embeddings of augmented views, computed with past weights of the network.
        """
        return self.bank.rows

    def num_negatives(self, batch_size: int) -> int:
        return len(self.bank.rows) - 1 if self.loss == "full" else self.negatives

    def effective(self, batch_size: int) -> dict[str, Any]:
        rows, dim = self.bank.rows.shape
        return super().effective(batch_size) | {
            "memory bank": f"{rows:,} x {dim}, {4 * rows * dim / 1e6:,.1f} MB",
        }

    def get_extra_state(self) -> Tensor:
        return torch.tensor([] if self.log_z is None else [self.log_z], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.log_z = float(state) if len(state) else None
