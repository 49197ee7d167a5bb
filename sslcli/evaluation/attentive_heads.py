"""Attentive classifiers on the same tokens, trained at the same time: one learned query attends to the tokens.

    k, v = tokens W_k, tokens W_v                                 (N, P, D)
    attention = softmax over tokens of q k^T / sqrt(e)            (N, H, P), one query q of D values, H heads
    logits = concatenated heads of (attention v) W + b            (N, C)

This is the classifier of CAPI (Darcet et al. 2025, arXiv:2502.08769, `AttnPoolClassifier` of
https://github.com/facebookresearch/capi/blob/main/eval_classification.py) and, without biases and after a BatchNorm of
the tokens, of AIM (El-Nouby et al. 2024, arXiv:2401.08541, `AttentionPoolingClassifier` of
https://github.com/apple/ml-aim/blob/main/aim-v1/aim/v1/torch/layers.py).

With a single query, keys and values of the tokens are not needed: q k^T is a product of the tokens with H vectors
W_k q, and the values are projected after the tokens are averaged. The logits and their gradients are the same, with
about D / H times fewer operations. A bias of the keys would add the same number to all scores of a head, and is left
out.

Sizes: N images, P tokens per image, D width, H heads of width e = D / H, G classifiers, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.evaluation.result import label_rank

BETAS = (0.9, 0.95)  # of AdamW, as in CAPI
EPSILON = 1e-8
LARGEST = 1 << 26  # values of the largest tensor of a forward pass; a step computes its gradients in parts of a batch


class AttentiveHeads(nn.Module):
    """G attentive classifiers with equal initial weights: tokens (N, P, D) -> logits (N, G, C).

    The parameters have G as first dimension. The loss of a classifier depends only on its own part.

    Args:
        count: number G of classifiers.
        width: width D of the tokens, divisible by `num_heads`.
        num_heads: number H of attention heads.
        num_classes: number C of classes.
        seed: seed of the initial weights.
    """

    def __init__(self, count: int, *, width: int, num_heads: int, num_classes: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            values = nn.init.trunc_normal_(torch.empty(shape), std=0.02, generator=generator)
            return nn.Parameter(values.expand(count, *shape).clone())

        inner = width // num_heads
        self.query = drawn(num_heads, inner)
        self.key = drawn(num_heads, inner, width)
        self.value = drawn(num_heads, inner, width)
        self.value_bias = nn.Parameter(torch.zeros(count, num_heads, inner))
        self.weight = drawn(num_classes, width)
        self.bias = nn.Parameter(torch.zeros(count, num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        count, num_heads, inner = self.query.shape
        scored = torch.einsum("ghe,ghed->ghd", self.query, self.key) / inner**0.5  # scores are products with these
        attention = (tokens @ scored.flatten(0, 1).T).softmax(dim=1)  # (N, P, G * H)
        pooled = attention.transpose(1, 2) @ tokens  # (N, G * H, D)
        values = torch.bmm(pooled.transpose(0, 1), self.value.flatten(0, 1).transpose(1, 2))  # (G * H, N, e)
        values = values + self.value_bias.flatten(0, 1)[:, None]
        joined = values.view(count, num_heads, len(tokens), inner).transpose(1, 2).flatten(2)  # (G, N, D)
        return torch.baddbmm(self.bias[:, None], joined, self.weight.transpose(1, 2)).transpose(0, 1)

    def chunk(self, shape: tuple[int, int]) -> int:
        """Return the number of images in one forward pass, which limits the memory. `shape` is (P, D)."""
        return max(1, LARGEST // (self.query.shape[:2].numel() * max(shape)))

    def accumulate(self, tokens: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add the gradient of the weighted sum of all losses to the gradients of the parameters.

        `tokens` (N, P, D), `labels` (N,), and `weights` (N, G) of the losses, such as 1 / N for their mean.
        """
        size = self.chunk((tokens.shape[1], tokens.shape[2]))
        parts = (torch.split(each, size) for each in (tokens, labels, weights))
        for some_tokens, some_labels, some_weights in zip(*parts, strict=True):
            logits = self(some_tokens)
            repeated = some_labels[:, None].expand(-1, logits.shape[1])
            losses = F.cross_entropy(logits.transpose(1, 2), repeated, reduction="none")  # (N, G)
            (losses * some_weights).sum().backward()


class SweepAdamW:
    """AdamW with its own learning rate and weight decay for each of G classifiers. Biases have no weight decay.

    Args:
        heads: the classifiers.
        lrs: (G,) peak learning rates.
        weight_decays: (G,) weight decays.
    """

    def __init__(self, heads: AttentiveHeads, *, lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
        self.parameters = dict(heads.named_parameters())
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        device = heads.query.device
        self.lrs, self.weight_decays = (torch.tensor(each, device=device) for each in (lrs, weight_decays))
        self.steps = 0

    @torch.no_grad()
    def step(self, *, scale: float) -> None:
        """Update the classifiers with their gradients, and clear these. `scale` multiplies the learning rates."""
        self.steps += 1
        corrections = [1 - beta**self.steps for beta in BETAS]
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            shape = (-1, *[1] * (parameter.ndim - 1))
            lr = (self.lrs * scale).view(shape)
            if "bias" not in name:
                parameter.mul_(1 - lr * self.weight_decays.view(shape))
            first, second = self.moments[name]
            first.lerp_(parameter.grad, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - BETAS[1])
            divisor = (second / corrections[1]).sqrt_().add_(EPSILON)
            parameter.sub_(lr / corrections[0] * first / divisor)
            parameter.grad = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Attentive classifiers and the normalization of their input.

    Attributes:
        heads: the classifiers.
        norm: module that maps tokens (n, D) to the input of the classifiers.
        shape: number of tokens P and width D.
    """

    heads: AttentiveHeads
    norm: nn.Module
    shape: tuple[int, int]

    def inputs(self, features: Tensor) -> Tensor:
        """Return the input (N, P, D) float32 of the classifiers. `features` (N, P * D) are the tokens."""
        tokens = features.to(self.heads.query.device).float().reshape(-1, self.shape[1])  # a ViT's are transposed
        return self.norm(tokens).view(len(features), *self.shape)  # type: ignore[no-any-return]

    @torch.no_grad()
    def score(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranks of the true classes, see `label_rank`, and the cross-entropies, (G, m) each, on the CPU.

        `features` (m, P * D) are the tokens, and `labels` (m,) the classes.
        """
        places, losses = [], []
        size = self.heads.chunk(self.shape)
        for rows, answers in zip(torch.split(features, size), torch.split(labels, size), strict=True):
            logits = self.heads(self.inputs(rows))
            repeated = answers.to(logits.device)[:, None].expand(-1, logits.shape[1])
            places.append(label_rank(logits.flatten(0, 1), repeated.flatten()).view(repeated.shape).T.cpu())
            losses.append(F.cross_entropy(logits.transpose(1, 2), repeated, reduction="none").T.cpu())
        return torch.cat(places, dim=1), torch.cat(losses, dim=1)
