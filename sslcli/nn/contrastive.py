"""Losses that two or more methods use. Most of these losses are contrastive.

A contrastive loss compares each anchor (query) with its positive and with negatives.

Shapes: N anchors, M negatives, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_VALUES = 1 << 22  # maximum number of similarities in memory at once; in float32, they take 16 MB
MIN_TEMPERATURE = 0.05  # for `nt_xent_symmetric`: sums of exp(1 / 0.05) are far below the float32 maximum
CPU_BLOCK = (256, 4096)  # (queries, negatives) per block of similarities; such a block fits the CPU caches


class Contrast(NamedTuple):
    """Result of a contrastive loss.

    `loss` is the mean loss. `accuracy` is the fraction of anchors for which the logit of the positive is larger than
    the logits of all negatives.
    """

    loss: Tensor
    accuracy: Tensor


class _InfoNCE(torch.autograd.Function):
    """Autograd function of the InfoNCE loss.

    The loss and its gradients are computed in one pass over blocks of similarities. The full (N, M) matrix of
    similarities between N queries and M negatives is never in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        positive: Tensor,
        negatives: Tensor,
        exclude: Tensor | None,
        present: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        need_query, need_positive, need_negatives = ctx.needs_input_grad[:3]
        fraction: Any  # weight of each query in the mean: a number, or (N, 1)
        assert present is None or not need_negatives, "the gradient of the negatives is computed from all queries"
        scaled_query, fraction = query / temperature, 1.0 / len(query)
        if present is not None:
            counted = present.to(query.dtype)  # (N,)
            fraction = counted[:, None] * fraction
        positive_logit = (scaled_query * positive).sum(1)  # (N,)
        grad_negatives = torch.zeros_like(negatives) if need_negatives else None
        if grad_negatives is None and exclude is None:
            max_negative_logit, log_sum, mean = _by_columns(scaled_query, positive_logit, negatives)
        else:
            max_negative_logit, log_sum, mean = _by_rows(
                scaled_query, positive_logit, negatives, exclude, grad_negatives
            )
        grad_positive_logit = ((positive_logit - log_sum).exp() - 1)[:, None] * fraction  # d loss / d positive logit
        ctx.save_for_backward(
            mean.mul_(fraction).addcmul_(grad_positive_logit, positive).div_(temperature) if need_query else None,
            grad_positive_logit * scaled_query if need_positive else None,
            None if grad_negatives is None else grad_negatives.mul_(fraction),
        )
        losses, hits = log_sum - positive_logit, (positive_logit > max_negative_logit).to(query.dtype)
        if present is not None:
            losses, hits = losses * counted, hits * counted
        accuracy = hits.mean()
        ctx.mark_non_differentiable(accuracy)
        return losses.mean(), accuracy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return (*grads, None, None, None)


def _by_rows(
    scaled_query: Tensor,
    positive_logit: Tensor,
    negatives: Tensor,
    exclude: Tensor | None,
    grad_negatives: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute three values per query, in blocks of queries. Each block uses all negatives.

    Args:
        scaled_query: (N, D), query / temperature.
        positive_logit: (N,), logit of each query with its positive.
        negatives: (M, D).
        exclude: (N, E) indices of the negatives to ignore for each query, or None.
        grad_negatives: (M, D) or None. If it is given, the gradient of the summed losses with respect to the negatives
            is added to it. This gradient is the sum of the scaled queries, weighted by softmax probabilities.

    Returns:
        The largest negative logit (N,).
        The log-sum-exp over the positive and the negatives (N,).
        The mean of the negatives, weighted by softmax probabilities (N, D).
    """
    found = []
    step = max(1, CHUNK_VALUES // len(negatives))
    blocks = zip(torch.split(scaled_query, step), torch.split(positive_logit, step), strict=True)
    for number, (q, positive) in enumerate(blocks):
        logits = q @ negatives.T  # (n, M)
        if exclude is not None:
            logits.scatter_(1, exclude[number * step : (number + 1) * step], -torch.inf)
        max_negative_logit = logits.amax(1)
        peak = torch.maximum(positive, max_negative_logit)
        weights = logits.sub_(peak[:, None]).exp_()
        total = weights.sum(1) + (positive - peak).exp()
        found.append((max_negative_logit, total.log() + peak, (weights @ negatives).div_(total[:, None])))
        if grad_negatives is not None:
            grad_negatives.addmm_(weights.T, q / total[:, None])
    max_negative_logit, log_sum, mean = map(torch.cat, zip(*found, strict=True))
    return max_negative_logit, log_sum, mean


def _by_columns(scaled_query: Tensor, positive_logit: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the largest negative logit, the log-sum-exp and the mean of the negatives, as `_by_rows` returns them.

    Here, the negatives are constants: no gradient is computed for them. For the arguments, see `_by_rows`. Blocks of
    queries and negatives are combined with online softmax: partial sums are rescaled when the maximum changes (Milakov
    and Gimelshein 2018, https://arxiv.org/abs/1805.02867). Therefore the blocks can be small enough for the CPU caches.
    Matrix products are fastest in the CPU caches.
    """
    found = []
    rows, columns = CPU_BLOCK if scaled_query.is_cpu else (len(scaled_query), max(1, CHUNK_VALUES // len(scaled_query)))
    for q, positive in zip(torch.split(scaled_query, rows), torch.split(positive_logit, rows), strict=True):
        peak, total, mean = positive, torch.ones_like(positive), torch.zeros_like(q)
        max_negative_logit = torch.full_like(positive, -torch.inf)
        for block in torch.split(negatives, columns):
            logits = q @ block.T
            max_negative_logit = torch.maximum(max_negative_logit, logits.amax(1))
            before, peak = peak, torch.maximum(peak, max_negative_logit)
            weights, fade = logits.sub_(peak[:, None]).exp_(), (before - peak).exp()
            total = total * fade + weights.sum(1)
            mean = mean.mul_(fade[:, None]).addmm_(weights, block)
        found.append((max_negative_logit, total.log() + peak, mean.div_(total[:, None])))
    max_negative_logit, log_sum, mean = map(torch.cat, zip(*found, strict=True))
    return max_negative_logit, log_sum, mean


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    exclude: Tensor | None = None,
    present: Tensor | None = None,
) -> Contrast:
    """Return the mean InfoNCE loss of `query[i]` with `positive[i]` and all `negatives` (CPC eq. 4, MoCo eq. 1).

    Args:
        query: (N, D), unit rows.
        positive: (N, D), unit rows.
        negatives: (M, D), unit rows, shared by all queries.
        temperature: divisor of the cosine similarities, above 0.
        exclude: (N, E) indices into `negatives`; row i lists the negatives to ignore for query i. None = ignore none.
        present: (N,) bool; a query with False contributes 0 to the means. None = all are present. With this argument,
            the negatives must not need a gradient.

    The loss is the mean over the N rows. It is computed in float32 (float64 for float64 inputs), even under autocast.
    The (N, M) similarities are computed in blocks, so that at most `CHUNK_VALUES` of them are in memory at once. The
    loss is not twice differentiable.
    """
    check_temperature(temperature)
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        if negatives is positive:
            negatives = negatives.view_as(negatives)  # torch.compile does not support one tensor for two arguments
        loss, accuracy = _InfoNCE.apply(
            query.to(dtype), positive.to(dtype), negatives.to(dtype), exclude, present, temperature
        )
    return Contrast(loss, accuracy)


class _Mutual(torch.autograd.Function):
    """Autograd function of the InfoNCE loss between the rows of one tensor (2N, D). Rows i and N + i are positives.

    The matrix of similarities is symmetric. Therefore the blocks below its diagonal are not computed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        num_rows = len(rows)
        partner = rows.roll(num_rows // 2, 0)
        positive_logit = (rows * partner).sum(1) / temperature
        positive = positive_logit.exp()
        total, max_negative_logit = positive.clone(), torch.full_like(positive, -torch.inf)
        for i, j, weights in _upper_blocks(rows, temperature):
            max_negative_logit[i] = torch.maximum(max_negative_logit[i], weights.amax(1))
            if i != j:
                max_negative_logit[j] = torch.maximum(max_negative_logit[j], weights.amax(0))
            total[i] += weights.exp_().sum(1)
            if i != j:
                total[j] += weights.sum(0)
        inverse = 1 / total
        grad = (positive * (inverse + inverse.roll(num_rows // 2)) - 2)[:, None] * partner
        whole, last = len(weights) == num_rows, [(i, j, weights)]
        again = ((i, j, logits.exp_()) for i, j, logits in _upper_blocks(rows, temperature))
        for i, j, weights in last if whole else again:
            weights.mul_(inverse[i, None] + inverse[j])
            grad[i].addmm_(weights, rows[j])
            if i != j:
                grad[j].addmm_(weights.T, rows[i])
        ctx.save_for_backward(grad.div_(num_rows * temperature))
        accuracy = (positive_logit > max_negative_logit).to(rows.dtype).mean()
        ctx.mark_non_differentiable(accuracy)
        return (total.log() - positive_logit).mean(), accuracy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None


def _upper_blocks(rows: Tensor, temperature: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the blocks on and above the diagonal of a matrix of logits, as (slice of rows, slice of columns, block).

    `rows` (2N, D) are unit rows, and the logits are their cosine similarities divided by `temperature`. The logits of a
    row with itself and with its positive (row i with row N + i) are -inf.
    """
    num_rows, side = len(rows), math.isqrt(math.prod(CPU_BLOCK) if rows.is_cpu else CHUNK_VALUES)
    scaled_query = rows / temperature
    for start in range(0, num_rows, side):
        for other in range(start, num_rows, side):
            i, j = slice(start, start + side), slice(other, other + side)
            logits = scaled_query[i] @ rows[j].T
            for offset in (0, num_rows // 2, -num_rows // 2):
                if -len(logits) < start + offset - other < logits.shape[1]:
                    logits.diagonal(start + offset - other).fill_(-torch.inf)
            yield i, j, logits


def nt_xent_symmetric(rows: Tensor, *, temperature: float) -> Contrast:
    """Return the InfoNCE loss over unit rows (2N, D). The positive of row i is row N + i, and vice versa.

    All other rows are negatives. The similarity of two rows is computed once and used for the losses of both rows.
    Forward and backward pass together therefore need only two thirds of the matrix products of a loss whose queries and
    keys are two different tensors. The loss is not twice differentiable.

    Exponentials are summed without subtracting a maximum. Therefore the temperature must be at least `MIN_TEMPERATURE`.
    Raises ValueError if the temperature is lower.
    """
    if temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature is {temperature}, but sums of exp(1 / temperature) must stay finite")
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        loss, accuracy = _Mutual.apply(rows, temperature)
    return Contrast(loss, accuracy)


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of |p - z|^2 = 2 - 2 cos(p, z) over L2-normalized rows p and z (BYOL eq. 2), in [0, 4].

    p is row i of `prediction` and z is row i of `target`, both (N, D). The function normalizes the rows. `target` gets
    no gradient.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    with torch.autocast(prediction.device.type, enabled=False):
        prediction = F.normalize(prediction.to(dtype), dim=1, eps=1e-12)
        target = F.normalize(target.detach().to(dtype), dim=1, eps=1e-12)
        return 2 - 2 * (prediction * target).sum(1).mean()


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but it divides the similarities, so it must be positive")


def check_momentum(momentum: float, final_momentum: float | None = None) -> None:
    """Raise ValueError unless the momentum of a moving average is in [0, 1].

    If the momentum increases to `final_momentum`, raise ValueError unless this value is in [`momentum`, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}, but it must lie in [0, 1]; the papers use 0.99 to 0.9999")
    if final_momentum is not None and not momentum <= final_momentum <= 1:
        raise ValueError(
            f"final_momentum is {final_momentum}, but the momentum increases to it from momentum={momentum}: choose a "
            f"value from {momentum} to 1"
        )
