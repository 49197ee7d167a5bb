"""CMC: bring the channels of one image together, each encoded by a network of its own.

Tian et al. 2020  https://arxiv.org/abs/1906.05849   conf/method/cmc.yaml

Shapes: N images a process, W processes, M modalities, n training images, D embedding size, K noise rows an image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli import heartbeat
from sslcli.distributed import all_gather, all_gather_with_grad, rank, world_size
from sslcli.losses import check_temperature
from sslcli.methods.bank import Bank, log_normalizer, nce, own_row_wins, sampled_softmax, scores
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn import SyncBatchNorm, convert_batch_norm, full_precision
from sslcli.noise import Noise

LOSSES = ("nce", "softmax", "batch")
GRAPHS = ("core", "full")
LAB = {"L": 1, "ab": 2}
LUMA_FIRST = ("lab", "ydbdr")  # colour spaces that are split so


class Encoders(nn.Module):
    """One copy of a backbone a modality, each seeing its own channels of the images.

    The first copy has the weights of the backbone. In the others the values of each trainable tensor are shuffled, so
    that the copies start as if each had been drawn by itself. Weights that were learned, which a backbone tells by
    `pretrained`, stay in their places in all of them.

    Args:
        backbone: of images with all channels. The first convolution of each copy is cut down to its modality's
            channels, with the weights these have in `backbone`.
        modalities: the number of channels by name, in the order of the channels of the images.

    Raises ValueError where the first convolution cannot be cut.
    """

    def __init__(self, backbone: nn.Module, modalities: Mapping[str, int]) -> None:
        super().__init__()
        self.channels = list(modalities.values())
        self.encoders = nn.ModuleDict()
        start = 0
        for name, channels in modalities.items():
            self.encoders[name] = narrowed(backbone, start, channels, sum(self.channels))
            if start and not getattr(backbone, "pretrained", False):
                shuffle(self.encoders[name])
            start += channels
        self.num_features = len(modalities) * num_features(backbone)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_features), the features of all modalities side by side, equally wide."""
        parts = torch.split(images, self.channels, dim=1)
        return torch.cat([encoder(part) for encoder, part in zip(self.encoders.values(), parts, strict=True)], dim=1)

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by stage of the backbone, those of all modalities along the channels. ValueError where it has none."""
        maps = []
        for encoder, part in zip(self.encoders.values(), torch.split(images, self.channels, dim=1), strict=True):
            if not hasattr(encoder, "stages"):
                raise ValueError(
                    f"the backbone {type(encoder).__name__} gives features but no maps by stage: "
                    "take a resnet, small or vit backbone, or define stages(images) in your own"
                )
            maps.append(encoder.stages(part))  # type: ignore[operator]
        return {name: torch.cat([of_one[name] for of_one in maps], dim=1) for name in maps[0]}


@torch.no_grad()
def shuffle(net: nn.Module) -> None:
    """Put the values of each trainable tensor of `net` into a random order: others of the same distribution."""
    for weight in net.parameters():
        if weight.requires_grad:
            weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))


def narrowed(backbone: nn.Module, start: int, channels: int, total: int) -> nn.Module:
    """A copy of `backbone` for images of the channels `start` to `start + channels` of `total` alone."""
    twin = copy.deepcopy(backbone)
    name, old = next(((n, m) for n, m in twin.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if old is None or not name:
        raise ValueError(
            f"the backbone {type(backbone).__name__} has no nn.Conv2d to be cut down to the channels of a modality: "
            "take a resnet, small or vit backbone, or begin your own with an nn.Conv2d"
        )
    if old.in_channels != total or old.groups != 1:
        raise ValueError(
            f"the first convolution of the backbone {type(backbone).__name__}, {name}, takes {old.in_channels} "
            f"channels in {old.groups} groups, but cutting it needs all {total} channels of the images in one group: "
            "take a resnet, small or vit backbone, or begin your own with such an nn.Conv2d"
        )
    settings = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    new = nn.Conv2d(channels, old.out_channels, bias=False, **settings)
    cut = old.weight.detach()[:, start : start + channels].clone()
    new.weight = nn.Parameter(cut, requires_grad=old.weight.requires_grad)
    new.bias = old.bias
    parent, _, last = name.rpartition(".")
    setattr(twin.get_submodule(parent), last, new)
    return twin


class CMC(Method):
    """Contrast the embedding of each modality with those that the others left behind, or have in the batch.

    Args:
        num_images: n, given by the command.
        channels: of the images, given by the command.
        modalities: the number of channels by name, in the order of the channels of the images; None is L and ab. The
            columns of `Batch.present` have the same order; images without a modality are left out of its pairs.
        graph: "core" pairs the first modality with each other one (eq. 7), "full" all with all (eq. 8). Each pair is
            contrasted in both directions.
        dim: embedding size D.
        loss: "nce" is noise-contrastive estimation and "softmax" the cross-entropy, both over the own row and K others
            of a memory bank of the other modality; "batch" is the cross-entropy over the other modality's embeddings
            of the global batch, without a bank.
        negatives: K, drawn uniformly with replacement, the same for all pairs; "batch" draws none.
        momentum: share of the old row in an update of a bank.
        temperature: divides the similarities.

    Raises ValueError for values outside these.
    """

    num_views = 1
    backbone: Encoders

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_images: int,
        channels: int,
        modalities: dict[str, int] | None = None,
        graph: str = "full",
        dim: int = 128,
        loss: str = "nce",
        negatives: int = 16384,
        momentum: float = 0.5,
        temperature: float = 0.07,
    ) -> None:
        color_spaces = LUMA_FIRST if modalities is None else ()
        modalities = checked(LAB if modalities is None else modalities, channels)
        check_temperature(temperature)
        if graph not in GRAPHS:
            raise ValueError(f"graph is {graph!r}, but it must be one of: {', '.join(GRAPHS)}")
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}, but it must be one of: {', '.join(LOSSES)}")
        if negatives < 1:
            raise ValueError(f"negatives is {negatives}, but an image needs at least one; loss=batch has the batch's")
        super().__init__(Encoders(backbone, modalities))
        self.color_spaces = color_spaces
        banks = {} if loss == "batch" else {name: Bank(num_images, dim, momentum=momentum) for name in modalities}
        self.banks = nn.ModuleDict(banks)
        self.heads = nn.ModuleDict({name: nn.Linear(num_features(backbone), dim) for name in modalities})
        convert_batch_norm(self, SyncBatchNorm)
        self.noise = Noise()
        self.names = list(modalities)
        pairs = combinations(range(len(modalities)), 2)
        self.pairs = [pair for pair in pairs if graph == "full" or pair[0] == 0]
        self.num_images, self.dim, self.negatives = num_images, dim, negatives
        self.loss, self.temperature = loss, temperature
        self.in_batch = loss == "batch"
        self.log_z: dict[tuple[int, int], float] = {}  # of "nce" by direction, set by its first batch and kept

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.compare(self.embed(batch))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        present = [] if batch.present is None else [batch.present]
        return (*self.project(batch.views[0]), batch.index, *present)  # M times (N, D), (N,), (N, M)

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        z, (index, *given) = rows[: len(self.names)], rows[len(self.names) :]
        present = given[0] if given else None
        with torch.autocast(index.device.type, enabled=False):
            v = [F.normalize(full_precision(part), dim=1) for part in z]
            if self.loss == "batch":
                scalars = self.contrast(v, present)
            else:
                others = self.noise.integers(self.num_images, len(v[0]), self.negatives, device=v[0].device)
                chosen = torch.cat([index[:, None], others], dim=1)  # (N, K + 1)
                scalars = self.contrast(v, present, chosen)
        for place, bank in enumerate(self.banks.values()):
            bank.remember(index, v[place], None if present is None else present[:, place])  # type: ignore[operator]
        self.embeddings = tuple(part.detach() for part in v)
        return scalars

    def contrast(self, v: list[Tensor], present: Tensor | None, chosen: Tensor | None = None) -> dict[str, Tensor]:
        """The sum over all pairs and both directions, and the mean accuracy, of unit embeddings M times (N, D).

        `present` (N, M) tells which images have which modality, None all; `chosen` (N, K + 1) are the rows of the
        banks that an image is compared with, its own first.
        """
        loss, accuracy = v[0].new_zeros(()), v[0].new_zeros(())
        for i, j in self.pairs:
            both = None if present is None else present[:, i] & present[:, j]
            for anchor, other in ((i, j), (j, i)):
                there = None if present is None else present[:, other]
                if chosen is None:
                    losses, hits = in_batch(v[anchor], v[other], there, temperature=self.temperature)
                else:
                    losses, hits = self.against_bank(v[anchor], (anchor, other), chosen, both)
                loss = loss + mean_where(losses, both)
                accuracy = accuracy + mean_where(hits, both)
        return {"loss": loss, "accuracy": accuracy / (2 * len(self.pairs))}

    def against_bank(
        self, v: Tensor, direction: tuple[int, int], chosen: Tensor, both: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Losses and hits, (N,) each, of one modality's `v` (N, D) against the other's bank.

        Rows where `both` (N,) is false take no part in the normaliser. It is one for each direction, as similarities
        in one may be larger than in the other.
        """
        bank = self.banks[self.names[direction[1]]]
        logits = scores(v, bank.rows, chosen, temperature=self.temperature)  # type: ignore[arg-type]
        hits = own_row_wins(logits, chosen)
        if self.loss == "softmax":
            return sampled_softmax(logits), hits
        if direction not in self.log_z:
            found = log_normalizer(logits, self.num_images, both)
            if found is None:  # no image of this batch has both, so none of the losses counts
                return logits.sum(1), hits
            self.log_z[direction] = found
        return nce(logits, log_z=self.log_z[direction], num_images=self.num_images), hits

    def after_step(self, progress: float) -> None:
        for bank in self.banks.values():
            bank.update()  # type: ignore[operator]

    def project(self, images: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> the embedding (N, D) of each modality before normalisation."""
        features = self.backbone(images).chunk(len(self.names), dim=1)
        return [head(part) for head, part in zip(self.heads.values(), features, strict=True)]

    def projection(self, images: Tensor) -> Tensor:
        return torch.cat(self.project(images), dim=1)  # (N, M * D)

    def num_negatives(self, batch_size: int) -> int:
        return batch_size - 1 if self.loss == "batch" else self.negatives

    def effective(self, batch_size: int) -> dict[str, Any]:
        facts: dict[str, Any] = super().effective(batch_size) | {
            "modalities": ", ".join(f"{n}: {c}" for n, c in zip(self.names, self.backbone.channels, strict=True)),
            "pairs contrasted": ", ".join(f"{self.names[i]} and {self.names[j]}" for i, j in self.pairs),
        }
        if self.banks:
            size = 4e-6 * self.num_images * self.dim * len(self.banks)
            facts["memory banks"] = f"{len(self.banks)} of {self.num_images:,} x {self.dim}, {size:,.1f} MB in all"
        return facts

    def get_extra_state(self) -> Tensor:
        found = [[*direction, log_z] for direction, log_z in self.log_z.items()]
        return torch.tensor(found, dtype=torch.float64).view(-1, 3)

    def set_extra_state(self, state: Tensor) -> None:
        self.log_z = {(int(i), int(j)): log_z for i, j, log_z in state.tolist()}


def checked(modalities: Mapping[str, int], channels: int) -> dict[str, int]:
    """The modalities, if they are two or more and have the channels of the images. Raises ValueError otherwise."""
    told = "{" + ", ".join(f"{name}: {count}" for name, count in modalities.items()) + "}"
    if len(modalities) < 2:
        raise ValueError(f"modalities is {told}, but contrasting needs at least two: name them as in {{L: 1, ab: 2}}")
    for name, count in modalities.items():
        if not str(name).isidentifier() or hasattr(nn.ModuleDict, str(name)):
            raise ValueError(f"modalities has {name!r}, which cannot name a part of a network: take a word like depth")
        if count < 1:
            raise ValueError(f"modalities is {told}, but each needs at least one channel")
    if sum(modalities.values()) != channels:
        raise ValueError(
            f"modalities is {told}, {sum(modalities.values())} channels in all, but the images have {channels}: "
            "give modalities={name: number of channels, ...} with all channels of the images in their order"
        )
    return dict(modalities)


def in_batch(query: Tensor, other: Tensor, present: Tensor | None, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding the own row of `other` among those of all processes, and hits, (N,) each.

    `query` and `other` are (N, D) unit rows, row i both of image i; gradients flow to both on every process. Images
    without the other modality, where `present` (N,) is false, are no negatives; their own losses mean nothing.
    """
    logits = query @ all_gather_with_grad(other).T / temperature  # (N, WN)
    if present is not None:
        # The lowest number and not -inf, so that the unused losses of absent images are numbers.
        logits = logits.masked_fill(~all_gather(present), torch.finfo(logits.dtype).min / 2)
    own = rank() * len(query) + torch.arange(len(query), device=query.device)
    with torch.no_grad():
        hardest = logits.scatter(1, own[:, None], -torch.inf).amax(1)
        hits = (logits.gather(1, own[:, None])[:, 0] > hardest).to(logits.dtype)
    return F.cross_entropy(logits, own, reduction="none"), hits


def mean_where(values: Tensor, rows: Tensor | None) -> Tensor:
    """() the mean of `values` (N,) over the images where `rows` (N,) is true, None all; 0 where none is.

    With several processes, what each has to contribute so that the mean over the processes is the mean over all such
    images, and with it the gradient.
    """
    if rows is None:
        return values.mean()
    count = rows.sum()
    if world_size() > 1:
        heartbeat.meet()
        dist.all_reduce(count)
    return torch.where(rows, values, 0.0).sum() * world_size() / count.clamp(min=1)
