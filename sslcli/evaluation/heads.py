"""Linear classifiers on the same features, trained at the same time with their weights in one matrix.

    logits (C*G, b) = W (C*G, d) x^T + bias      one matrix product for all classifiers ("heads")

Sizes: b images per batch, d dimensions, C classes, G heads. `protocol=linear` trains heads on cached features, and
`protocol=linear_sgd` on the features of random crops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.evaluation.result import label_rank

Heads = tuple[Tensor, Tensor]  # weights (d, G*C) and biases (G*C,) of all heads


class SgdHeads:
    """G linear classifiers that SGD with momentum trains on the same batches, each with its own hyperparameters.

    Weights and biases are initialized with zeros. Biases have no weight decay. A head that diverges to NaN does not
    affect the other heads.

    Args:
        lrs: (G,) peak learning rates.
        weight_decays: (G,) weight decays.
        width: number of features d.
        num_classes: number of classes C.
        momentum: momentum in [0, 1).
        nesterov: True for Nesterov momentum, as in torch.optim.SGD.
        device: device of weights and features.
        dtype: dtype of weights and updates, at least 32 bits.
    """

    def __init__(
        self,
        *,
        lrs: Sequence[float],
        weight_decays: Sequence[float],
        width: int,
        num_classes: int,
        momentum: float,
        nesterov: bool = False,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # All matrices are transposed, with rows ordered by class, then head. In the usual layout, products with a
        # narrow right matrix would take several times as long, and a softmax over ten adjacent elements would take
        # longer than the products.
        rows = num_classes * len(lrs)
        self.num_classes, self.momentum, self.nesterov = num_classes, momentum, nesterov
        self.weight = torch.zeros(rows, width, dtype=dtype, device=device)
        self.bias = torch.zeros(rows, 1, dtype=dtype, device=device)
        self.weight_step, self.bias_step = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.lr = self.weight.new_tensor(lrs).repeat(num_classes)[:, None]
        self.decay = self.weight.new_tensor(weight_decays).repeat(num_classes)[:, None]

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, *, scale: float) -> None:
        """Update all heads with the mean cross-entropy of features x (b, d) and labels y (b,).

        `scale` is the factor of the schedule, by which all learning rates are multiplied. Matrix products are computed
        in the dtype of x, which may have 16 bits.
        """
        logits = (self.weight.to(x.dtype) @ x.T).to(self.weight.dtype).add_(self.bias)
        error = cross_entropy_gradient(logits, y, self.num_classes)
        weight_gradient, bias_gradient = error.to(x.dtype) @ x, error.sum(dim=1, keepdim=True)
        self.weight_step.mul_(self.momentum).add_(weight_gradient).addcmul_(self.weight, self.decay)
        self.bias_step.mul_(self.momentum).add_(bias_gradient)
        weight_step, bias_step = self.weight_step, self.bias_step
        if self.nesterov:
            weight_step = (weight_step * self.momentum).add_(weight_gradient).addcmul_(self.weight, self.decay)
            bias_step = (bias_step * self.momentum).add_(bias_gradient)
        self.weight.addcmul_(weight_step, self.lr, value=-scale)
        self.bias.addcmul_(bias_step, self.lr, value=-scale)

    def heads(self) -> Heads:
        """Return the weights (d, G*C) and the biases (G*C,) of all heads."""
        by_head = self.weight.view(self.num_classes, -1, self.weight.shape[1]).permute(2, 1, 0)
        return by_head.reshape(self.weight.shape[1], -1), self.bias.view(self.num_classes, -1).T.flatten()


def cross_entropy_gradient(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the gradient of the mean cross-entropy with respect to `logits`: (softmax - one-hot) / b.

    `logits` (C*G, b) are the outputs of G heads for C classes and b images, and `labels` is (b,). The gradient has the
    shape of `logits`.
    """
    b = len(labels)
    error = logits.view(num_classes, -1, b).softmax(dim=0)
    error[labels, :, torch.arange(b, device=labels.device)] -= 1
    return error.div_(b).view(-1, b)


@torch.no_grad()
def score(x: Tensor, y: Tensor, heads: Heads, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """Evaluate G heads (linear classifiers) on features x (m, d) with labels y (m,).

    Returns the ranks (G, m) int64 of the true classes, see `label_rank`, and the mean cross-entropies (G,). A
    row with NaN or infinite logits counts as wrong. A NaN or infinite loss is replaced by the largest float.
    """
    weight, bias = heads
    count = len(bias) // num_classes
    chunk = max(1, (1 << 22) // len(bias))  # at most 16 MiB of logits, for cache locality
    places, losses = [], x.new_zeros(count)
    for rows, labels in zip(torch.split(x, chunk), torch.split(y, chunk), strict=True):
        logits = torch.addmm(bias, rows, weight).view(-1, num_classes)  # (m*G, C)
        repeated = labels.repeat_interleave(count)
        loss = F.cross_entropy(logits, repeated, reduction="none").view(-1, count)
        losses += loss.sum(dim=0)
        places.append(label_rank(logits, repeated).view(-1, count))
    return torch.cat(places).T, (losses / len(x)).nan_to_num(nan=torch.finfo(losses.dtype).max)
