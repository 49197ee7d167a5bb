"""Losses of Deep InfoMax: bounds on mutual information, and adversarial prior matching.

Hjelm et al. 2019  https://arxiv.org/abs/1808.06670   used by sslcli/methods/deep_infomax.py

Shapes: N images per process, W processes, M images whose feature maps are compared with each global vector, n positions
of a feature map, k global vectors per image (1 in the paper), D size of a global vector. `dot_loss` compares embeddings
of positions with embeddings of global vectors, and u is the size of these embeddings. M is W N if the maps of all
processes are gathered, else N.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sslcli.distributed.collectives import all_gather_with_grad, rank
from sslcli.nn.contrastive import CHUNK_VALUES
from sslcli.nn.modes import full_precision

LOG2 = math.log(2)
UNBOUNDED = ("X2", "W1")  # measures with an unbounded loss: it decreases without limit as scores grow
OFFICIAL_MASK = -10.0

# For each measure: the function applied to positive scores, and the function applied to negative scores. They implement
# the variational bounds of Nowozin et al. 2016, https://arxiv.org/abs/1606.00709. X2 has the signs of the official
# code, which differ from the signs in the papers.
_ELEMENTWISE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "GAN": (lambda p: -F.softplus(-p), F.softplus),
    "JSD": (lambda p: LOG2 - F.softplus(-p), lambda q: F.softplus(q) - LOG2),
    "X2": (lambda p: p.square(), lambda q: -0.5 * (q.abs() + 1).square()),
    "KL": (lambda p: p, lambda q: torch.exp(q - 1)),
    "RKL": (lambda p: -torch.exp(-p), lambda q: q - 1),
    "H2": (lambda p: 1 - torch.exp(-p), lambda q: torch.exp(q) - 1),
    "W1": (lambda p: p, lambda q: q),
}
MEASURES = ("InfoNCE", "DV", *(name for name in _ELEMENTWISE if name not in UNBOUNDED))


def expectations(positive: Tensor, negative: Tensor, measure: str) -> tuple[Tensor, Tensor]:
    """Return the expectation over positive scores and the expectation over negative scores, for scores of any shape.

    `measure` selects a divergence. The first expectation minus the second one is a lower bound of this divergence. The
    loss is the negative of the bound (section 3.1 of the Deep InfoMax paper).
    """
    if measure == "DV":
        return positive.mean(), negative.flatten().logsumexp(0) - math.log(negative.numel())
    of_positive, of_negative = _ELEMENTWISE[measure]
    return of_positive(positive).mean(), of_negative(negative).mean()


def information_loss(positive: Tensor, rows: Tensor, *, count: int, measure: str, gather: bool = True) -> Tensor:
    """Return the loss that maximizes the mutual information of vectors and feature maps of the same image.

    The loss is from section 3.1 of Deep InfoMax (arXiv:1808.06670). For InfoNCE, it is a cross-entropy. For all other
    measures, it is the negative of a bound on the mutual information. Each of the N images has k vectors, and a feature
    map with n positions.

    Args:
        positive: (N, k, n) scores of each vector with each position of the same image.
        rows: (N, k) output of `reduce_negatives` for the scores of each vector with other images.
        count: number of scores that are reduced to one element of `rows`.
        measure: one of MEASURES.
        gather: if True, the measure DV normalizes over the vectors of all processes. All other measures ignore
            `gather`.
    """
    if measure == "InfoNCE":  # all positions of an image have the same negatives: one log-sum-exp suffices
        return (torch.logaddexp(positive, rows[..., None]) - positive).mean()
    if measure == "DV":
        everyone = (all_gather_with_grad(rows) if gather else rows).flatten()
        return everyone.logsumexp(0) - math.log(everyone.numel() * count) - positive.mean()
    return rows.mean() / count - _ELEMENTWISE[measure][0](positive).mean()


def reduce_negatives(scores: Tensor, own: Tensor | None, *, measure: str, official_mask: bool = False) -> Tensor:
    """Reduce the scores of each vector to one value: (..., positions) -> (...).

    A score compares a vector with one position of a feature map. The measures InfoNCE and DV use the log-sum-exp of the
    scores. All other measures use the sum of a function of the scores. `own` (broadcastable to `scores`) is True for
    positions of the vector's own image. The scores of these positions are excluded, with one exception: if
    `official_mask` is True, InfoNCE includes them with the value -10, as in the official code. If `own` is None, no
    position belongs to the vector's own image.
    """
    if measure in ("InfoNCE", "DV"):
        mask = OFFICIAL_MASK if official_mask and measure == "InfoNCE" else -torch.inf
        return (scores if own is None else scores.masked_fill(own, mask)).logsumexp(-1)
    of_negative = _ELEMENTWISE[measure][1]
    if own is None:
        return of_negative(scores).sum(-1)
    return of_negative(scores.masked_fill(own, 0)).masked_fill(own, 0).sum(-1)


def dot_loss(
    places: Tensor, vectors: Tensor, *, measure: str, official_mask: bool = False, gather: bool = True
) -> Tensor:
    """Return the loss for pairs of a global vector and a position of a feature map, with dot products as scores.

    The score of a pair is the dot product of two embeddings of size u. The embeddings are not normalized, and the
    scores are not divided by a temperature. The positives of a vector are the positions of its own image. The negatives
    are positions of other images.

    `places` (N, u, n) are the embeddings of the n positions of the map of each image. `vectors` (N, u, k) are the
    embeddings of the k global vectors of each image. `measure` is one of MEASURES. `official_mask` is described in
    `reduce_negatives`. If `gather` is True, the negatives are positions of images of all processes. If it is False,
    they are positions of images of this process.

    The loss is computed in float32, or in float64 for float64 inputs. If there are more than about `CHUNK_VALUES`
    scores, they are computed in blocks, and the backward pass computes each block again. The scores therefore never
    need more memory than one block.

    Raises ValueError if there are fewer than 2 images.
    """
    with torch.autocast(places.device.type, enabled=False):
        places, vectors = full_precision(places), full_precision(vectors)
        everyone, first = (all_gather_with_grad(places), rank() * len(places)) if gather else (places, 0)
        num_images, _, num_places = everyone.shape
        if num_images < 2:
            raise ValueError(
                "Deep InfoMax contrasts images of a batch, but there is 1: set train.batch_size to 2 or more"
            )
        candidates = everyone.transpose(0, 1).flatten(1)  # (u, Mn)
        image_of = torch.arange(num_images, device=places.device).repeat_interleave(num_places)

        def block(mine: Tensor, ids: Tensor, candidates: Tensor) -> Tensor:
            scores = mine.transpose(1, 2) @ candidates  # (rows, k, Mn)
            own = (image_of == ids[:, None])[:, None]
            return reduce_negatives(scores, own, measure=measure, official_mask=official_mask)

        ids = first + torch.arange(len(vectors), device=places.device)
        step = max(1, CHUNK_VALUES // (vectors.shape[2] * candidates.shape[1]))
        blocks = list(zip(torch.split(vectors, step), torch.split(ids, step), strict=True))
        if len(blocks) == 1:
            rows = block(vectors, ids, candidates)
        else:
            rows = torch.cat(
                [checkpoint(block, *part, candidates, use_reentrant=False, preserve_rng_state=False) for part in blocks]
            )
        positive = vectors.transpose(1, 2) @ places  # (N, k, n)
        count = (num_images - 1) * num_places
        return information_loss(positive, rows, count=count, measure=measure, gather=gather)


def concat_loss(score: nn.Module, maps: Tensor, vectors: Tensor, *, measure: str, gather: bool = True) -> Tensor:
    """Return the loss of the scores of pairs: a global vector, and the local features at one position of a map.

    `maps` is (N, C, H, W), `vectors` is (N, D). The network `score` computes the scores (N, 1, H, W) from the
    concatenated pairs (N, D + C, H, W). The negatives of an image are the local features of the next image.
    `measure` and `gather` are described in `dot_loss`.
    """
    maps, vectors = full_precision(maps), full_precision(vectors)
    everyone, first = (all_gather_with_grad(maps), rank() * len(maps)) if gather else (maps, 0)
    others = everyone.roll(-1, 0)[first : first + len(maps)]
    beside = vectors[:, :, None, None].expand(-1, -1, *maps.shape[2:])
    pairs = torch.cat([torch.cat([beside, beside]), torch.cat([maps, others])], dim=1)
    with torch.autocast(maps.device.type, enabled=False):
        positive, negative = full_precision(score(pairs)).flatten(2).chunk(2)  # (N, 1, n) each
        rows = reduce_negatives(negative, None, measure=measure)
        return information_loss(positive, rows, count=negative.shape[2], measure=measure, gather=gather)


def prior_losses(discriminator: nn.Module, vectors: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of encoder and discriminator for matching sigmoid(`vectors`) to the prior (paper, sec. 3.3).

    `vectors` and the samples `prior` are (N, D). The encoder loss is non-saturating. The encoder loss has no gradient
    for the discriminator, and the discriminator loss has no gradient for the encoder. One backward pass of the sum
    therefore gives each network the gradient of its own loss.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        code = full_precision(vectors).sigmoid()
        frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
        encoder_loss = F.softplus(-functional_call(discriminator, frozen, (code,))).mean()
        real, fake = discriminator(torch.cat([prior.to(code.dtype), code.detach()])).chunk(2)
        expected_real, expected_fake = expectations(real, fake, "GAN")
        return encoder_loss, expected_fake - expected_real
