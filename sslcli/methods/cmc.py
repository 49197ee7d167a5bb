"""CMC: contrastive loss between groups of channels (modalities) of an image. Each modality has its own encoder.

Tian et al. 2020  https://arxiv.org/abs/1906.05849   conf/method/cmc.yaml

Shapes: N images per process, W processes, M modalities, n training images, D embedding size. With a memory bank, each
image is compared with K random rows of the bank.
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

from sslcli.distributed import watchdog
from sslcli.distributed.collectives import all_gather, all_gather_with_grad, rank, world_size
from sslcli.methods.bank import Bank, log_normalizer, nce, own_row_wins, sampled_softmax, scores
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.contrastive import check_temperature
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise

LOSSES = ("nce", "softmax", "batch")
GRAPHS = ("core", "full")
LAB = {"L": 1, "ab": 2}
LUMA_FIRST = ("lab", "ydbdr")  # color spaces with one luma channel, followed by two chroma channels


class Encoders(nn.Module):
    """One copy of a backbone per modality, applied to the channels of that modality.

    The first copy has the weights of the backbone. In the other copies, the values of each trainable tensor are
    shuffled, which is equivalent to an independent initialization. If `backbone.pretrained` exists and is true, for
    example because of `init`, all copies keep the weights of the backbone.

    Args:
        backbone: a backbone for images with all channels. In each copy, the first convolution keeps only the input
            channels of the copy's modality, and the weights of these channels.
        modalities: maps the name of each modality to its number of channels, in the channel order of the images.

    Raises ValueError if the first convolution cannot be restricted to the channels of a modality.
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
        """Return the concatenated features of all modalities: (N, C, H, W) -> (N, num_features)."""
        parts = torch.split(images, self.channels, dim=1)
        return torch.cat([encoder(part) for encoder, part in zip(self.encoders.values(), parts, strict=True)], dim=1)

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Return feature maps by stage. The maps of all modalities are concatenated along the channels.

        Raises ValueError if the backbone has no `stages`.
        """
        maps = []
        for encoder, part in zip(self.encoders.values(), torch.split(images, self.channels, dim=1), strict=True):
            if not hasattr(encoder, "stages"):
                raise ValueError(
                    f"the backbone {type(encoder).__name__} returns features but no feature maps by stage: "
                    "choose a resnet, small or vit backbone, or define stages(images) in your own"
                )
            maps.append(encoder.stages(part))  # type: ignore[operator]
        return {name: torch.cat([of_one[name] for of_one in maps], dim=1) for name in maps[0]}


@torch.no_grad()
def shuffle(net: nn.Module) -> None:
    """Randomly permute the values within each trainable tensor of `net`, in place."""
    for weight in net.parameters():
        if weight.requires_grad:
            weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))


def narrowed(backbone: nn.Module, start: int, channels: int, total: int) -> nn.Module:
    """Return a copy of `backbone` that takes only the image channels from `start` to `start + channels - 1`.

    `total` is the number of channels of the images. Raises ValueError if the backbone has no nn.Conv2d, or if its first
    nn.Conv2d does not take all channels in one group.
    """
    twin = copy.deepcopy(backbone)
    name, old = next(((n, m) for n, m in twin.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if old is None or not name:
        raise ValueError(
            f"the backbone {type(backbone).__name__} has no nn.Conv2d to restrict to the channels of a modality: "
            "choose a resnet, small or vit backbone, or start your own with an nn.Conv2d"
        )
    if old.in_channels != total or old.groups != 1:
        raise ValueError(
            f"the first convolution of the backbone {type(backbone).__name__}, {name}, takes {old.in_channels} "
            f"channels in {old.groups} groups, but it must take all {total} channels of the images in one group: "
            "choose a resnet, small or vit backbone, or start your own with such an nn.Conv2d"
        )
    settings = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    new = nn.Conv2d(channels, old.out_channels, bias=False, **settings)
    weight = old.weight.detach()[:, start : start + channels].clone()
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    new.bias = old.bias
    parent, _, last = name.rpartition(".")
    setattr(twin.get_submodule(parent), last, new)
    return twin


class CMC(Method):
    """Contrastive multiview coding: contrastive loss between pairs of modalities, with memory banks or without.

    Args:
        num_images: number of training images n; ssl-train sets it.
        channels: number of image channels; ssl-train sets it.
        modalities: maps the name of each modality to its number of channels, in the channel order of the images. None
            means {L: 1, ab: 2}. `Batch.present` states which modalities each image has; its columns are in the order of
            `modalities`. If an image lacks a modality, the image is excluded from all pairs with this modality.
        graph: "core" pairs the first modality with each of the others (eq. 7). "full" uses all pairs (eq. 8). The loss
            of each pair is computed in both directions.
        dim: embedding size D.
        loss: "nce", "softmax" or "batch". With "nce" and "softmax", an embedding is compared with K + 1 rows of the
            memory bank of the other modality: the row of the same image and K random rows. "nce" is noise-contrastive
            estimation, and "softmax" is the cross-entropy. With "batch", there is no bank. The loss is the
            cross-entropy over the embeddings of the other modality in the global batch.
        negatives: K, the number of random rows. They are drawn uniformly with replacement, and have the same indices in
            all pairs of modalities. Unused with "batch".
        momentum: weight of the old row in an update of a bank.
        temperature: the similarities are divided by this value.

    Raises ValueError if an argument is out of range.
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
            raise ValueError(
                f"negatives is {negatives}, but must be at least 1; loss=batch uses the batch as negatives"
            )
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
        self.uses_in_batch_negatives = loss == "batch"
        # log Z of "nce" for each direction (anchor, other), computed from the first batch and constant afterwards.
        self.log_z: dict[tuple[int, int], float] = {}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.compare(self.embed(batch))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        present = [] if batch.present is None else [batch.present]
        return (*self.project(batch.views[0]), batch.index, *present)  # M x (N, D), (N,), optionally (N, M)

    def compare(self, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
        z, (index, *masks) = rows[: len(self.names)], rows[len(self.names) :]
        present = masks[0] if masks else None
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
        """Return the loss, summed over pairs and directions, and the accuracy, averaged over pairs and directions.

        `v` contains the unit embeddings (N, D) of M modalities. `present` (N, M) is True if image n has modality m;
        None means that all images have all modalities. `chosen` (N, K + 1) contains the indices of the bank rows with
        which each image is compared. Column 0 is the index of the row of the same image. If `chosen` is None, the
        embeddings are compared with the batch instead of the bank.
        """
        loss, accuracy = v[0].new_zeros(()), v[0].new_zeros(())
        for i, j in self.pairs:
            both = None if present is None else present[:, i] & present[:, j]
            for anchor, other in ((i, j), (j, i)):
                there = None if present is None else present[:, other]
                if chosen is None:
                    losses, hits = in_batch_loss(v[anchor], v[other], there, temperature=self.temperature)
                else:
                    losses, hits = self.against_bank(v[anchor], (anchor, other), chosen, both)
                loss = loss + mean_where(losses, both)
                accuracy = accuracy + mean_where(hits, both)
        return {"loss": loss, "accuracy": accuracy / (2 * len(self.pairs))}

    def against_bank(
        self, v: Tensor, direction: tuple[int, int], chosen: Tensor, both: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return losses (N,) and hits (N,) of the embeddings `v` (N, D) against the memory bank of the other modality.

        A hit is 1 if the largest logit belongs to the row of the same image, else 0. `direction` is a pair: the index
        of the modality of `v`, and the index of the other modality. `both` (N,) is True if the image has both
        modalities. `chosen` is described in `contrast`.

        With the loss "nce", the exponentials of the logits are divided by a constant Z, see `log_normalizer`. Z is
        computed once per direction, in the first batch that has images with both modalities, and from these images
        only. Each direction has its own Z, because the similarities of different directions may differ in scale.
        """
        bank = self.banks[self.names[direction[1]]]
        logits = scores(v, bank.rows, chosen, temperature=self.temperature)  # type: ignore[arg-type]
        hits = own_row_wins(logits, chosen)
        if self.loss == "softmax":
            return sampled_softmax(logits), hits
        if direction not in self.log_z:
            found = log_normalizer(logits, self.num_images, both)
            if found is None:  # no image of this batch has both modalities; the caller then masks all losses
                return logits.sum(1), hits
            self.log_z[direction] = found
        return nce(logits, log_z=self.log_z[direction], num_images=self.num_images), hits

    def after_step(self, progress: float) -> None:
        for bank in self.banks.values():
            bank.update()  # type: ignore[operator]

    def project(self, images: Tensor) -> list[Tensor]:
        """Return the embeddings of M modalities before normalization: (N, C, H, W) -> M tensors (N, D)."""
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
    """Return the modalities as a dict, from the name of each modality to its number of channels.

    Raises ValueError in these cases:

    - There are fewer than two modalities.
    - A name is not valid as the name of a submodule in `nn.ModuleDict`.
    - A modality has no channels.
    - The numbers of channels do not sum to `channels`, the number of channels of the images.
    """
    text = "{" + ", ".join(f"{name}: {count}" for name, count in modalities.items()) + "}"
    if len(modalities) < 2:
        raise ValueError(f"modalities is {text}, but contrasting needs at least two: name them as in {{L: 1, ab: 2}}")
    for name, count in modalities.items():
        if not str(name).isidentifier() or hasattr(nn.ModuleDict, str(name)):
            raise ValueError(
                f"modalities has {name!r}, which is not a valid name of a submodule: use a word such as depth"
            )
        if count < 1:
            raise ValueError(f"modalities is {text}, but each needs at least one channel")
    if sum(modalities.values()) != channels:
        raise ValueError(
            f"modalities is {text}, {sum(modalities.values())} channels in all, but the images have {channels}: "
            "set modalities={name: number of channels, ...} with all channels of the images in their order"
        )
    return dict(modalities)


def in_batch_loss(query: Tensor, other: Tensor, present: Tensor | None, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy (N,) of each row of `query`. The correct class is the row of `other` of the same image.

    The classes are the rows of `other` of all processes. `query` and `other` (N, D) are unit embeddings of two
    modalities of the same images. Also returns hits (N,): 1 if the correct class has the largest logit, else 0.
    Gradients flow to `query` and `other` on every process. Images for which `present` (N,) is False lack the modality
    of `other`. These images are not used as negatives, and the caller masks their losses.
    """
    logits = query @ all_gather_with_grad(other).T / temperature  # (N, WN)
    if present is not None:
        # A large finite value is used instead of -inf, so that the masked losses stay finite.
        logits = logits.masked_fill(~all_gather(present), torch.finfo(logits.dtype).min / 2)
    own = rank() * len(query) + torch.arange(len(query), device=query.device)
    with torch.no_grad():
        max_negative_logit = logits.scatter(1, own[:, None], -torch.inf).amax(1)
        hits = (logits.gather(1, own[:, None])[:, 0] > max_negative_logit).to(logits.dtype)
    return F.cross_entropy(logits, own, reduction="none"), hits


def mean_where(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return the mean of `values` (N,) over the images for which `rows` (N,) is True, or 0 if there is no such image.

    rows=None selects all images. With several processes, the return value is scaled such that its average over
    processes is the mean over the selected images of all processes. The average of the gradients is then the gradient
    of this mean.
    """
    if rows is None:
        return values.mean()
    count = rows.sum()
    if world_size() > 1:
        watchdog.record_collective()
        dist.all_reduce(count)
    return torch.where(rows, values, 0.0).sum() * world_size() / count.clamp(min=1)
