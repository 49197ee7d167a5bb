"""Deep InfoMax: maximize the mutual information between the global vector of an image and its feature map.

Hjelm et al. 2019  https://arxiv.org/abs/1808.06670   conf/method/deep_infomax.yaml
Official code  https://github.com/rdevon/DIM   File names in comments are those of its directory cortex_DIM.

The local feature map is the map of one stage of the backbone. The global vector is computed from the features of the
whole image. The global term of the loss compares the vector with an encoding of the whole local feature map. The local
term compares the vector with each position of the map, which means with the C values of the map at this position.

Shapes: N images per process; C channels and n = H W positions of the local feature map; D vector size. Vectors and
positions are embedded to u values and then compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.distributed.collectives import world_size
from sslcli.errors import check_positive, nearest
from sslcli.methods.base import Batch, Method, maps_of, num_features
from sslcli.methods.gan import gradient_penalty
from sslcli.methods.mutual_information import MEASURES, UNBOUNDED, concat_loss, dot_loss, prior_losses
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.heads import mlp
from sslcli.nn.modes import evaluating, full_precision
from sslcli.nn.noise import Noise

SCORES = ("dot", "concat")


class Embed(nn.Module):
    """Network that embeds each position of a feature map independently: (N, C, H, W) -> (N, u, H, W).

    The C values of a position are mapped to u values. u is the argument `units`. The outputs of a network with one
    hidden layer and of a linear shortcut are added. LayerNorm over the u values follows. If u >= C, the shortcut is
    initialized close to the identity.
    """

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.nonlinear = nn.Sequential(
            nn.Conv2d(channels, units, 1, bias=False), nn.BatchNorm2d(units), nn.ReLU(), nn.Conv2d(units, units, 1)
        )
        self.shortcut = nn.Conv2d(channels, units, 1, bias=False)
        self.norm = nn.LayerNorm(units)
        if units >= channels:
            nn.init.uniform_(self.shortcut.weight, -0.01, 0.01)
            with torch.no_grad():
                self.shortcut.weight[:channels, :, 0, 0].fill_diagonal_(1.0)

    def forward(self, maps: Tensor) -> Tensor:
        out = self.nonlinear(maps) + self.shortcut(maps)
        return self.norm(out.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]


class Pairing(nn.Module):
    """The two embedding networks of the local term of the loss: one for feature maps, one for global vectors.

    Shapes: maps (N, C, H, W) -> (N, u, n), vectors (N, D) -> (N, u, 1). u is the embedding size, and n = H W is the
    number of positions of a map.
    """

    def __init__(self, channels: int, dim: int, units: int) -> None:
        super().__init__()
        self.of_places = Embed(channels, units)
        self.of_vectors = Embed(dim, units)

    def forward(self, maps: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_places(maps).flatten(2), self.of_vectors(vectors[:, :, None, None]).flatten(2)


def scorer(channels: int, units: int) -> nn.Sequential:
    """Build a network that computes one score at each position: (N, channels, H, W) -> (N, 1, H, W).

    The input at a position is a pair: one vector per image, and the local features at this position. Both are
    concatenated, and `channels` is their total size. `units` is the number of channels of the hidden layers.
    """
    return nn.Sequential(
        nn.Conv2d(channels, units, 1), nn.ReLU(), nn.Conv2d(units, units, 1), nn.ReLU(), nn.Conv2d(units, 1, 1)
    )


def map_encoder(channels: int, units: int, *, hidden: int) -> nn.Sequential:
    """Build the network that encodes a whole local feature map as one vector: (N, C, H, W) -> (N, units).

    The global term of the loss compares this vector with the global vector of an image. C is `channels`, and `hidden`
    is the width of the hidden layer.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        mlp([16 * 2 * channels, hidden, units], last_bias=True),
    )


def official_map_encoder(channels: int, height: int, width: int, units: int, *, hidden: int) -> nn.Sequential:
    """Build the encoder of the local feature map as in the official code: (N, C, height, width) -> (N, units).

    C is `channels`, and `hidden` is the width of the hidden layer.

    In the official code, the local feature map of CIFAR-10 images has C = 128 channels and 8 x 8 positions. The map
    encoder has the layers of the image encoder, starting with the layer that computes the local feature map
    (models/dim.py, GlobalDIM.build). These are two 4x4 convolutions of stride 2 with C and 2C channels, a hidden layer,
    and a linear layer.

    Raises ValueError if a side of the map has fewer than 4 positions.
    """
    if min(height, width) < 4:
        raise ValueError(
            f"official_global is true, but the local feature map has {height} x {width} positions, and the official "
            "map encoder needs at least 4 x 4: choose an earlier local_stage, or set official_global to false"
        )
    return nn.Sequential(
        nn.Conv2d(channels, channels, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.Flatten(),
        mlp([2 * channels * (height // 4) * (width // 4), hidden, units], last_bias=True),
    )


def choose_stage(maps: dict[str, Tensor], name: str | None) -> str:
    """Return the name of the stage whose map is the local feature map: `name`, or a default if `name` is None.

    The default is the stage whose map is nearest to 8 x 8. If several stages are equally near, the default is the
    deepest of them. If there are several stages, the last stage is excluded, because the features are the mean of its
    map: each position of this map already contributes to the features.

    Raises ValueError if the stage `name` does not exist or its map has a single position. Also raises ValueError if
    `name` is None and the maps of all possible stages have a single position.
    """
    sides = {stage: math.sqrt(m.shape[2] * m.shape[3]) for stage, m in maps.items()}
    if name is not None:
        if name not in maps:
            raise ValueError(
                f"local_stage is {name!r}, but the backbone has the stages {', '.join(maps)}.{nearest(name, maps)}"
            )
        if sides[name] == 1:
            raise ValueError(
                f"local_stage is {name!r}, whose map has a single position: choose an earlier one of "
                f"{', '.join(maps)}, or use larger images"
            )
        return name
    candidates = [stage for stage in list(maps)[: max(1, len(maps) - 1)] if sides[stage] > 1]
    if not candidates:
        raise ValueError(
            f"no stage of the backbone ({', '.join(maps)}) has a map of several positions: use larger images"
        )
    return min(reversed(candidates), key=lambda stage: abs(math.log(sides[stage] / 8)))


class DeepInfoMax(Method):
    """Deep InfoMax. The loss is alpha * global + beta * local + gamma * prior + the discriminator loss.

    The discriminator loss includes `gradient_penalty` times the gradient penalty. "The vector" below is the global
    vector of an image, computed from the features of the whole image. The local feature map is the map of one stage of
    the backbone.

    Args:
        image_size, channels: side in pixels and number of channels of the training images; ssl-train sets both.
        alpha: weight of the global term, which pairs the vector with an encoding of the whole local feature map.
        beta: weight of the local term, which pairs the vector with each position of the local feature map.
        gamma: weight of the prior term, which makes the distribution of the vectors uniform. 0 removes the prior term
            and the discriminator.
        gradient_penalty: weight of the gradient penalty of the discriminator. The penalty is the squared norm of the
            gradient of a score with respect to the input, averaged over the vectors and the samples of the prior. 0
            removes the penalty.
        measure: measure of mutual information, one of MEASURES.
        score: "dot" or "concat". With "dot", the score of a pair is the dot product of two embeddings, and all other
            images are negatives. With "concat", a network computes the score from the concatenated pair, and the next
            image of the batch is the only negative.
        dim: vector size D.
        hidden: width of the hidden layer of the head. None: the head is one linear layer.
        units: for "dot", the embedding width u. For "concat", the width of the hidden layers.
        map_hidden: width of the hidden layer of the map encoder in the global term.
        prior_widths: widths of the hidden layers of the discriminator of the prior term.
        local_stage: name of the backbone stage whose map is the local feature map. None selects the map nearest to
            8 x 8.
        official_mask: True: InfoNCE uses each position of the same image as a negative with score -10, as in the
            official code. False: positions of the same image are not used as negatives.
        official_global: True: the networks of the global term are those of the official code: `official_map_encoder`,
            and one linear layer for the vector. False: `map_encoder`, and `Embed` for the vector.
        gather_negatives: True: the images of all processes are negatives. False: only the images of the same process
            are negatives.
    """

    num_views = 1
    decreasing_metric = "information"  # `loss` includes the discriminator loss, which increases as the encoder improves

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        alpha: float = 0.0,
        beta: float = 1.0,
        gamma: float = 0.1,
        gradient_penalty: float = 0.0,
        measure: str = "InfoNCE",
        score: str = "dot",
        dim: int = 64,
        hidden: int | None = None,
        units: int = 256,
        map_hidden: int = 1024,
        prior_widths: Sequence[int] = (1000, 200),
        local_stage: str | None = None,
        official_mask: bool = False,
        official_global: bool = False,
        gather_negatives: bool = True,
    ) -> None:
        super().__init__(backbone)
        check_weights(alpha=alpha, beta=beta, gamma=gamma, gradient_penalty=gradient_penalty)
        check_choices(measure, score, official_mask=official_mask, official_global=official_global)
        check_positive(dim=dim, units=units, map_hidden=map_hidden)
        images = torch.linspace(-1, 1, 2 * channels * image_size**2).view(2, channels, image_size, image_size)
        maps = maps_of(backbone, images)
        with evaluating(backbone), torch.no_grad():
            features = backbone(images)
        self.local_stage = choose_stage(maps, local_stage)
        *_, self.last_stage = maps
        last = maps[self.last_stage].mean((2, 3))
        self.one_pass = last.shape == features.shape and torch.allclose(last, features, rtol=1e-4, atol=1e-6)
        _, local_channels, rows, columns = maps[self.local_stage].shape
        self.places = rows * columns
        width = num_features(backbone)
        self.head = mlp([width, *([] if hidden is None else [hidden]), dim], last_bias=True)
        dot = score == "dot"
        if beta:
            self.local_term = Pairing(local_channels, dim, units) if dot else scorer(dim + local_channels, units)
        if alpha:
            if official_global:
                self.map_encoder = official_map_encoder(local_channels, rows, columns, units, hidden=map_hidden)
                self.global_term: nn.Module = nn.Conv2d(dim, units, 1)  # a linear layer, on maps of one position
            else:
                self.map_encoder = map_encoder(local_channels, units, hidden=map_hidden)
                self.global_term = Embed(dim, units) if dot else scorer(dim + units, units)
        if gamma:
            self.discriminator = mlp([dim, *prior_widths, 1], norm=False, bias=True, last_bias=True)
        convert_batch_norm(self, SyncBatchNorm)
        self.alpha, self.beta, self.gamma, self.gradient_penalty = alpha, beta, gamma, gradient_penalty
        self.differentiates_twice = gradient_penalty > 0
        self.dot, self.measure = dot, measure
        self.official_mask = official_mask
        self.gather_negatives = gather_negatives
        self.noise = Noise()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        maps, features = self.encode(images)
        vectors = self.head(features)  # (N, D)
        self.embeddings = (vectors.detach(),)
        scalars = {}
        if self.beta:
            scalars["local"] = self.local_loss(maps, vectors)
        if self.alpha:
            scalars["global"] = self.global_loss(maps, vectors)
        none = vectors.new_zeros(())
        scalars["information"] = self.alpha * scalars.get("global", none) + self.beta * scalars.get("local", none)
        loss = scalars["information"]
        if self.gamma:
            prior = self.noise.uniform(*vectors.shape, device=vectors.device)
            scalars["prior"], scalars["discriminator"] = prior_losses(self.discriminator, vectors, prior)
            loss = loss + self.gamma * scalars["prior"] + scalars["discriminator"]
            if self.gradient_penalty:
                scalars["gradient_penalty"] = self.discriminator_penalty(vectors, prior)
                loss = loss + self.gradient_penalty * scalars["gradient_penalty"]
        return {"loss": loss, **scalars}

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return local feature maps (N, C, H, W) and features (N, num_features).

        The maps are those of one stage of the backbone, see `local_stage`. If the features of the backbone are the mean
        of the map of its last stage, one forward pass is sufficient. Otherwise, the features need a second one.
        """
        maps = self.backbone.stages(images)  # type: ignore[operator]
        features = maps[self.last_stage].mean((2, 3)) if self.one_pass else self.backbone(images)
        return maps[self.local_stage], features

    def local_loss(self, maps: Tensor, vectors: Tensor) -> Tensor:
        """Return the local term of the loss, between vectors (N, D) and each position of the maps (N, C, H, W)."""
        settings: dict[str, Any] = {"measure": self.measure, "gather": self.gather_negatives}
        if not self.dot:
            return concat_loss(self.local_term, maps, vectors, **settings)
        places, queries = self.local_term(maps, vectors)
        return dot_loss(places, queries, official_mask=self.official_mask, **settings)

    def global_loss(self, maps: Tensor, vectors: Tensor) -> Tensor:
        """Return the global term of the loss, which compares global vectors with encodings of whole feature maps.

        `maps` (N, C, H, W) are the local feature maps, which this function encodes. `vectors` (N, D) are the
        global vectors.
        """
        settings: dict[str, Any] = {"measure": self.measure, "gather": self.gather_negatives}
        whole = self.map_encoder(maps)[:, :, None]  # (N, u, 1)
        if not self.dot:
            return concat_loss(self.global_term, whole[..., None], vectors, **settings)
        queries = self.global_term(vectors[:, :, None, None]).flatten(2)
        return dot_loss(whole, queries, official_mask=self.official_mask, **settings)

    def discriminator_penalty(self, vectors: Tensor, prior: Tensor) -> Tensor:
        """Return the gradient penalty of the discriminator, not multiplied by the weight of the penalty.

        In the official code, models/discriminator.py adds the penalty to the loss.

        `vectors` and the samples `prior` are (N, D). The penalty is the mean of |d score / d sigmoid(vector)|^2 and
        |d score / d sample|^2, averaged over all vectors and samples. It has no gradient for the encoder.
        """
        inputs = torch.cat([full_precision(vectors).sigmoid().detach(), full_precision(prior)])
        return 2 * gradient_penalty(self.discriminator, inputs)  # `gradient_penalty` returns half the squared norm

    def projection(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))  # type: ignore[no-any-return]

    def effective(self, batch_size: int) -> dict[str, Any]:
        facts: dict[str, Any] = {"local map": f"{self.local_stage}, {self.places} places"}
        if self.dot:
            images = batch_size if self.gather_negatives else batch_size // world_size()
            facts["negative images per vector"] = images - 1
        return facts


def check_weights(**weights: float) -> None:
    """Raise ValueError if a weight is below 0, or if `alpha` and `beta` are both 0."""
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name} is {weight}, but the weight of a term must be at least 0 (0 disables it)")
    if not weights["alpha"] + weights["beta"] > 0:
        raise ValueError(
            "alpha and beta are both 0, so the loss does not distinguish images: set beta=1 (local term) or alpha=1 "
            "(global)"
        )


def check_choices(measure: str, score: str, *, official_mask: bool, official_global: bool) -> None:
    """Raise ValueError if a value or the combination of values is not valid. The message states what to change."""
    if measure in UNBOUNDED:
        raise ValueError(
            f"measure is {measure!r}, whose loss decreases without bound as scores grow: choose one of "
            f"{', '.join(MEASURES)}"
        )
    if measure not in MEASURES:
        hint = nearest(measure, MEASURES)
        raise ValueError(f"measure is {measure!r}, but it must be one of: {', '.join(MEASURES)}.{hint}")
    if score not in SCORES:
        raise ValueError(f"score is {score!r}, but it must be one of: {', '.join(SCORES)}")
    if official_mask and (measure != "InfoNCE" or score != "dot"):
        raise ValueError(
            f"official_mask applies only to measure=InfoNCE with score=dot, but they are {measure} and {score}: "
            "set it to false"
        )
    if official_global and score != "dot":
        raise ValueError(f"official_global applies only to score=dot, but score is {score}: set it to false")
