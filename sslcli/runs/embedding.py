"""Features of images in batches: the network, its images and their order. `ssl-embed` and `sslcli.embed` share it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sslcli import __version__
from sslcli.config.backbone_choice import UNKNOWN_SIZE
from sslcli.config.run_config import NetworkConfig
from sslcli.data.bad_images import BadImage
from sslcli.data.loader import plain_batches
from sslcli.data.sources.base import Source
from sslcli.data.sources.image_paths import ImagePaths
from sslcli.distributed import devices
from sslcli.errors import ConfigError
from sslcli.evaluation import layers
from sslcli.evaluation.features import encode_batch
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating
from sslcli.report.console import Screen
from sslcli.runs.encoder import pixel_format_of, subject_of
from sslcli.runs.evaluate import check_images_fit, report_other_images
from sslcli.runs.evaluation import PATH_KEYS
from sslcli.runs.result_name import dataset_facts
from sslcli.runs.subject import Subject, load_subject


@dataclass(frozen=True)
class EmbeddedBatch:
    """Features of consecutive images.

    Attributes:
        images: number of images of the batch, with unreadable ones.
        positions: (n,) int64, positions of the readable images in the dataset.
        features: (n, d) float32.
        unreadable: path -> reason, of the images that cannot be read.
    """

    images: int
    positions: NDArray[np.int64]
    features: NDArray[np.float32]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class Embedding:
    """A network and the images that it embeds.

    The images are divided into the same batches as in ssl-eval, which extracts the features of each split separately.
    Therefore the features have the same bits. Features of 16 bits are converted to float32, which does not round.

    Attributes:
        splits: for each split to embed, the positions of its images in `source`. Each image is in one split.
    """

    config: NetworkConfig
    device: torch.device
    subject: Subject
    source: Source
    net: nn.Module
    splits: dict[str, Tensor]

    @property
    def total(self) -> int:
        """Number of images, with unreadable ones."""
        return sum(map(len, self.splits.values()))

    def batches(self, start: int = 0) -> Iterator[EmbeddedBatch]:
        """Yield the batches in order, without the first `start` images, which are whole batches."""
        encode = partial(
            encode_batch,
            partial(layers.read, self.net, self.config.feature_layer),
            prepare=self.subject.prepare,
            device=self.device,
            precision=self.subject.precision,
        )
        size, workers = self.config.batch_size, self.config.workers
        for positions in self.splits.values():
            rest, start = positions[start:], max(0, start - len(positions))
            if not len(rest):
                continue
            with devices.unchanged_random_state(self.device), evaluating(self.net):
                loaded = plain_batches(self.source, rest, batch_size=size, workers=workers)
                for (images, readable), part in zip(loaded, torch.split(rest, size), strict=True):
                    features = encode(images)[readable].float().numpy()
                    bad = dict(map(self.reason, part[~readable].tolist()))
                    yield EmbeddedBatch(len(part), part[readable].numpy(), features, bad)

    def reason(self, position: int) -> tuple[str, str]:
        """Return the path of an image that was unreadable, and the reason."""
        try:
            self.source.read(position)
        except BadImage as error:
            return error.path, error.reason
        return self.source.path(position), "the image could not be read at first, but can be read now"

    def identity(self) -> str:
        """Return a digest of everything on which the features and their order depend."""
        subject, source, views = self.subject, self.source, self.subject.views
        positions = b"".join(part.numpy().tobytes() for part in self.splits.values())
        key = [
            {key: value for key, value in subject.provenance.items() if key not in PATH_KEYS},
            [self.config.feature_layer, subject.precision, self.config.batch_size, self.device.type],
            [source.version, source.image_size, hashlib.sha256(positions).hexdigest(), list(self.splits)],
            [views.color_space, views.normalize, list(subject.mean), list(subject.std)],
            [__version__, torch.__version__, self.config.backbone],
        ]
        return hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:16]

    def provenance(self) -> dict[str, Any]:
        """Return JSON values that state the origin of the features."""
        subject, source = self.subject, self.source
        named = self.net if isinstance(self.net, Method) else subject
        return {
            "identity": self.identity(),
            **subject.provenance,
            "feature_layer": self.config.feature_layer,
            "evaluated_part": named.evaluated_part,
            "transform": f"test transform at {source.image_size} px, as in ssl-eval",
            **dataset_facts(source),
            "splits": list(self.splits),
            "precision": subject.precision,
            "batch_size": self.config.batch_size,
            "sslcli": __version__,
            "torch": torch.__version__,
        }


def prepare(
    config: NetworkConfig, device: torch.device, screen: Screen, *, images: list[str] | None, split: str
) -> Embedding:
    """Load the network and the images.

    Args:
        images: paths of image files and folders; None = the images of `config.dataset`, or of the run's dataset.
        split: "all", or the name of a split of the dataset. It has no effect on `images`.

    Raises ConfigError if the network lacks the layer, does not accept the images, or if there are no images.
    """
    if images is None:
        subject, source = load_subject(config, device)
        report_other_images(config, subject, source, screen)
    else:
        subject = subject_of(config, device)
        source = source_of(subject, images)
    for message in subject.messages:
        screen.say(message)
    net = subject.net("trained")
    check_images_fit(subject, source, net, device)
    example = torch.zeros(2, source.channels, source.image_size, source.image_size, device=device)
    with devices.unchanged_random_state(device):
        layers.check(net, config.feature_layer, subject.prepare(example))
    if config.feature_layer == layers.BANK:
        raise ConfigError("feature_layer is 'bank', whose rows belong to training images: choose another layer")
    splits = chosen_splits(source, split) if images is None else {"images": source.splits["train"]}
    return Embedding(config, device, subject, source, net, splits)


def source_of(subject: Subject, images: list[str]) -> ImagePaths:
    """Return image files and folders as a dataset with the image size and channels of pre-training."""
    format = pixel_format_of(subject)
    size = subject.image_size or UNKNOWN_SIZE
    return ImagePaths(
        paths=images, image_size=size, channels=format.channels, value_range=format.value_range, workers=None
    )


def chosen_splits(source: Source, split: str) -> dict[str, Tensor]:
    """Return the positions of the images of each split to embed. Each image is in one split.

    The images of "val" that are also in "train" count as "val". Raises ConfigError if there are no images.
    """
    splits = source.nonempty_splits()
    if split == "all":
        splits = {"train": source.without_labels_of("val"), **{k: v for k, v in splits.items() if k != "train"}}
        return {name: positions for name, positions in splits.items() if len(positions)}
    if split not in splits:
        raise ConfigError(f"split is {split!r}, but {source.name} has the splits: {', '.join(splits)}")
    return {split: splits[split]}
