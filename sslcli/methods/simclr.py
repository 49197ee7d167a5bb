"""SimCLR: contrast two views of an image with all other views of the batch.

Chen et al. 2020  https://arxiv.org/abs/2002.05709   conf/method/simclr.yaml
Yeh et al. 2022   https://arxiv.org/abs/2110.06848   option `decoupled`: DCL and DCLW
Chuang et al. 2020    https://arxiv.org/abs/2007.00224   option `same_class`: debiased contrastive loss
Robinson et al. 2021  https://arxiv.org/abs/2010.04592   option `hardness`: hard negatives

Shapes: N images per process, W processes, D embedding size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.distributed.collectives import all_gather, all_gather_with_grad, rank, world_size
from sslcli.methods.base import Batch, Method, num_features
from sslcli.methods.mixture import UnMix, add_mixture
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import MIN_TEMPERATURE, Contrast, check_temperature, info_nce, nt_xent_symmetric
from sslcli.nn.heads import mlp
from sslcli.nn.modes import full_precision

DECOUPLED = ("none", "unweighted", "weighted")


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float, memory: Tensor | None = None) -> Contrast:
    """Return the normalized temperature-scaled cross-entropy (eq. 1), as the mean over the 2N anchors of this process.

    `z1` and `z2` are (N, D) and are normalized in this function. Row i of `z1` and row i of `z2` are embeddings of two
    views of the same image. Each row is an anchor, and the other view of its image is its positive. The negatives are
    the 2(WN - 1) views of all other images on all W processes. Gradients flow through the negatives of all processes.
    If `memory` (K, D) is given, its unit rows are additional negatives of every anchor.
    """
    rows = F.normalize(full_precision(torch.cat([z1, z2])), dim=1)
    if world_size() == 1 and memory is None and temperature >= MIN_TEMPERATURE:
        return nt_xent_symmetric(rows, temperature=temperature)
    z1, z2 = rows.chunk(2)
    num_rows, total = len(z1), world_size() * len(z1)
    further = [] if memory is None else [memory.to(z1.dtype)]
    candidates = torch.cat([all_gather_with_grad(z1), all_gather_with_grad(z2), *further])  # (2WN + K, D)
    mine = rank() * num_rows + torch.arange(num_rows, device=z1.device)
    same_image = torch.stack([mine, mine + total], dim=1).repeat(2, 1)  # (2N, 2): the anchor itself and its positive
    return info_nce(rows, torch.cat([z2, z1]), candidates, temperature=temperature, exclude=same_image)


def decoupled_nt_xent(z1: Tensor, z2: Tensor, *, temperature: float, sigma: float | None = None) -> Contrast:
    """Return the decoupled contrastive loss (DCL, eq. 6), as the mean over the 2N anchors of this process.

    The arguments are those of `nt_xent`. The loss of an anchor is -w s / temperature + log sum exp(t / temperature),
    where s is its similarity to its positive, and the sum is over its similarities t to all negatives. Unlike in
    `nt_xent`, the sum does not contain the positive. The loss may therefore be negative.

    sigma: None selects w = 1 (DCL). A number selects the weights of DCLW, w_i = 2 - G softmax_i(s_i / sigma) over the G
        images of all processes (eq. 7). Pairs with different views then have larger weights. The mean of w is 1. The
        weights are constants for the gradient, as in lightly.
    """
    check_temperature(temperature)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.normalize(full_precision(z), dim=1) for z in (z1, z2))
        num_rows, total = len(z1), world_size() * len(z1)
        candidates = torch.cat([all_gather_with_grad(z1), all_gather_with_grad(z2)])  # (2WN, D)
        similarity = (z1 * z2).sum(1)
        mine = rank() * num_rows + torch.arange(num_rows, device=z1.device)
        same_image = torch.stack([mine, mine + total], dim=1).repeat(
            2, 1
        )  # (2N, 2): the anchor itself and its positive
        logits = (torch.cat([z1, z2]) @ candidates.T / temperature).scatter(1, same_image, -torch.inf)
        weight = torch.ones_like(similarity)
        if sigma is not None:
            share = F.softmax(all_gather(similarity) / sigma, dim=0)  # (WN,)
            weight = 2 - total * share[mine]
        positive = (similarity / temperature).repeat(2)
        loss = (torch.logsumexp(logits, 1) - weight.repeat(2) * positive).mean()
        return Contrast(loss, (positive > logits.amax(1)).to(loss.dtype).mean().detach())


def debiased_nt_xent(z1: Tensor, z2: Tensor, *, temperature: float, same_class: float, hardness: float) -> Contrast:
    """Return the debiased contrastive loss with hard negatives, as the mean over the 2N anchors of this process.

    The arguments are those of `nt_xent`, and:

    same_class: tau+, the estimated fraction of negatives that have the class of the anchor, at least 0 and below 1.
        Their expected contribution is subtracted from the sum over negatives (Chuang et al., eq. 8).
    hardness: beta, at least 0. Negatives have weights proportional to exp(beta s / temperature), where s is their
        similarity to the anchor (Robinson et al., eq. 4). With 0, all weights are equal.

    With P = exp(s / temperature) of the positive and M negatives, the loss is -log(P / (P + N)), where N is the larger
    of (sum of weighted exponentials - tau+ M P) / (1 - tau+) and M exp(-1 / temperature), the least possible sum.
    """
    check_temperature(temperature)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.normalize(full_precision(z), dim=1) for z in (z1, z2))
        num_rows, total = len(z1), world_size() * len(z1)
        candidates = torch.cat([all_gather_with_grad(z1), all_gather_with_grad(z2)])  # (2WN, D)
        positive = ((z1 * z2).sum(1) / temperature).repeat(2)
        mine = rank() * num_rows + torch.arange(num_rows, device=z1.device)
        same_image = torch.stack([mine, mine + total], dim=1).repeat(
            2, 1
        )  # (2N, 2): the anchor itself and its positive
        logits = (torch.cat([z1, z2]) @ candidates.T / temperature).scatter(1, same_image, -torch.inf)
        count = 2 * total - 2
        weighted = logits + torch.log_softmax(hardness * logits, dim=1) if hardness else logits - math.log(count)
        negatives = weighted.exp().sum(1) * count
        share = positive.exp()
        least = count * math.exp(-1 / temperature)
        negatives = ((negatives - same_class * count * share) / (1 - same_class)).clamp(min=least)
        loss = (torch.log(share + negatives) - positive).mean()
        return Contrast(loss, (positive > logits.amax(1)).to(loss.dtype).mean().detach())


class SimCLR(Method):
    """SimCLR: NT-Xent loss between two views, with the views of the global batch as negatives.

    Args:
        dim: embedding size D.
        hidden: width of the head's hidden layers. None selects the width of the features, as in the official code.
        layers: number of linear layers of the head, 2 in v1.
        norm: use BatchNorm in the head, as in the official code. The BatchNorm after the last layer has no beta.
        init_std: standard deviation of the head's initial weights, 0.01 in the official code. None selects torch's
            default initialization. In a layer with BatchNorm, the scale of the weights does not change the output.
            However, small weights have a higher effective learning rate. LARS compensates for this, but SGD does not.
        temperature: divisor of the similarities: 0.1 on ImageNet with large batches, 0.5 on CIFAR-10.
        decoupled: "none", or the loss without the positive in its denominator: "unweighted" (DCL) or "weighted" (DCLW).
        sigma: temperature of the weights of DCLW.
        same_class: estimated fraction of negatives of the same class, for the debiased loss; 0.1 on CIFAR-10. With 0,
            the loss is not debiased.
        hardness: strength of the weights of hard negatives (beta), 1 on CIFAR-10 and STL-10. 0 weights all equally.
        mixture: an `UnMix` that mixes the first views of different images; None adds no mixtures. In a second loss
            term, the mixtures replace the first views.
    """

    num_views = 2
    uses_in_batch_negatives = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 128,
        hidden: int | None = None,
        layers: int = 2,
        norm: bool = True,
        init_std: float | None = None,
        temperature: float = 0.1,
        decoupled: str = "none",
        sigma: float = 0.5,
        same_class: float = 0.0,
        hardness: float = 0.0,
        mixture: UnMix | None = None,
    ) -> None:
        super().__init__(backbone)
        check_temperature(temperature)
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden is {hidden}, but a hidden layer has at least one unit; null: as many as features")
        if decoupled not in DECOUPLED:
            raise ValueError(f"decoupled is {decoupled!r}, but it must be one of {', '.join(DECOUPLED)}")
        if not sigma > 0:
            raise ValueError(f"sigma is {sigma}, but it divides similarities, so it must be positive")
        if layers < 1:
            raise ValueError(f"layers is {layers}, but the head has at least one")
        if not 0 <= same_class < 1 or hardness < 0:
            raise ValueError(
                f"same_class is {same_class} and hardness is {hardness}, but same_class is a fraction below 1, and "
                "hardness is at least 0"
            )
        if (same_class or hardness) and decoupled != "none":
            raise ValueError(f"decoupled is {decoupled}, but same_class and hardness belong to another loss: set one")
        width = num_features(backbone)
        widths = [width, *([hidden or width] * (layers - 1)), dim]
        bias = not norm
        self.head = mlp(widths, norm=norm, bias=bias, last_bias=bias, last_norm="scale" if norm else None)
        if init_std is not None:
            for layer in self.head:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=init_std)
        convert_batch_norm(self, SyncBatchNorm)
        self.temperature = temperature
        self.decoupled, self.sigma = decoupled, sigma
        self.same_class, self.hardness = same_class, hardness
        self.mixture = mixture

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z = self.embed(batch)
        return add_mixture(
            self.mixture,
            self.compare(z),
            batch.views[0],
            query=self.projection,
            compare=lambda mixed: self.contrast(mixed, z[1]).loss,
        )

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        x1, x2 = batch.views
        return self.projection(x1), self.projection(x2)  # (N, D)

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        z1, z2 = rows
        contrast = self.contrast(z1, z2)
        self.embeddings = (z1.detach(), z2.detach())
        return {"loss": contrast.loss, "accuracy": contrast.accuracy}

    def contrast(self, z1: Tensor, z2: Tensor) -> Contrast:
        """Return the loss of the embeddings (N, D) of two views."""
        if self.same_class or self.hardness:
            options = {"same_class": self.same_class, "hardness": self.hardness}
            return debiased_nt_xent(z1, z2, temperature=self.temperature, **options)
        if self.decoupled == "none":
            return nt_xent(z1, z2, temperature=self.temperature)
        sigma = self.sigma if self.decoupled == "weighted" else None
        return decoupled_nt_xent(z1, z2, temperature=self.temperature, sigma=sigma)

    def projection(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))  # type: ignore[no-any-return]

    def num_negatives(self, batch_size: int) -> int:
        return 2 * batch_size - 2
