"""Losses that two or more methods share.

Shapes: N anchors, M negatives, D embedding size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_VALUES = 1 << 22  # similarities held at a time: 16 MB in float32


class Contrast(NamedTuple):
    """What contrasting gives: the mean loss, and the share of anchors whose positive beats all negatives."""

    loss: Tensor
    accuracy: Tensor


class _InfoNCE(torch.autograd.Function):
    """Loss and gradients in one pass over blocks of rows, so that no (N, M) matrix exists."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        positive: Tensor,
        negatives: Tensor,
        exclude: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        num_rows, scale = len(query), 1.0 / (len(query) * temperature)
        need_query, need_positive, need_negatives = ctx.needs_input_grad[:3]
        grad_query = torch.empty_like(query) if need_query else None
        grad_positive = torch.empty_like(positive) if need_positive else None
        grad_negatives = torch.zeros_like(negatives) if need_negatives else None
        loss, hits = query.new_zeros(()), query.new_zeros(())
        step = max(1, CHUNK_VALUES // max(1, len(negatives)))
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            q, p = query[rows], positive[rows]
            positive_logit = (q * p).sum(1) / temperature  # (n,)
            logits = (q @ negatives.T).div_(temperature)  # (n, M)
            if exclude is not None:
                logits.scatter_(1, exclude[rows], -torch.inf)
            hardest = logits.amax(1)
            hits += (positive_logit > hardest).sum()
            peak = torch.maximum(positive_logit, hardest)
            share = logits.sub_(peak[:, None]).exp_()  # (n, M), becomes the softmax over the candidates
            total = share.sum(1) + (positive_logit - peak).exp()
            loss += (total.log() + peak - positive_logit).sum()
            slope = ((positive_logit - peak).exp() / total - 1)[:, None] * scale  # d loss / d positive similarity
            share /= total[:, None]
            if grad_query is not None:
                torch.addmm(slope * p, share, negatives, alpha=scale, out=grad_query[rows])
            if grad_positive is not None:
                torch.mul(slope, q, out=grad_positive[rows])
            if grad_negatives is not None:
                grad_negatives.addmm_(share.T, q, alpha=scale)
        ctx.save_for_backward(grad_query, grad_positive, grad_negatives)
        accuracy = hits / num_rows
        ctx.mark_non_differentiable(accuracy)
        return loss / num_rows, accuracy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return (*grads, None, None)


def info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, *, temperature: float, exclude: Tensor | None = None
) -> Contrast:
    """Cross-entropy of finding `positive[i]` among `negatives` for each `query[i]` (CPC eq. 4, MoCo eq. 1).

    Args:
        query: (N, D), rows of unit length.
        positive: (N, D), rows of unit length.
        negatives: (M, D), rows of unit length, shared by all queries.
        temperature: divides the cosines, > 0.
        exclude: (N, E) columns of `negatives` that are no negatives of row i, or None.

    Returns the mean over the N rows. Works in float32 (or float64 if given) even under autocast; memory beyond the
    gradients is at most `CHUNK_VALUES` similarities. The gradient can be taken once, not twice.
    """
    check_temperature(temperature)
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        loss, accuracy = _InfoNCE.apply(query.to(dtype), positive.to(dtype), negatives.to(dtype), exclude, temperature)
    return Contrast(loss, accuracy)


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of |p - z|^2 = 2 - 2 cos(p, z) after L2-normalisation (BYOL eq. 2); no gradient to `target`.

    `prediction` and `target` are (N, D) of any length; the result lies in [0, 4].
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


def check_momentum(momentum: float) -> None:
    """Raise ValueError unless the momentum of a target network lies in [0, 1]."""
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}, but it must lie in [0, 1]; the papers use 0.99 to 0.9999")
