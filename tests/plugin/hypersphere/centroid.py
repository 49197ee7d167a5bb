"""Nearest class centroid: a probe of frozen features without hyperparameters.

A class is represented by the mean of its L2-normalized train features; an image gets the class with the highest cosine
similarity. conf/protocol/centroid.yaml

Shapes: n train images, m images of the reported split, d features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sslcli.evaluation.base import FeatureProtocol, OnProgress, ignore_progress
from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.result import accuracy, bootstrap_interval, label_rank, top5

NO_CENTROID = -2.0  # score of a class without train images, below any cosine similarity


def centroid_scores(train: Tensor, labels: Tensor, images: Tensor, *, num_classes: int) -> Tensor:
    """Return the cosine similarity (m, C) of `images` (m, d) to the class means of `train` (n, d).

    `labels` (n,) are the classes of the rows of `train`.
    """
    one_hot = F.one_hot(labels, num_classes).float()  # (n, C)
    count = one_hot.sum(0)
    means = one_hot.T @ F.normalize(train.float(), dim=1) / count.clamp(min=1)[:, None]  # (C, d)
    scores = F.normalize(images.float(), dim=1) @ F.normalize(means, dim=1).T
    return scores.masked_fill(count == 0, NO_CENTROID)


@dataclass(frozen=True, kw_only=True)
class Centroid(FeatureProtocol):
    """The protocol `centroid`.

    Args:
        seed: seed of the bootstrap.
        resamples: number of bootstrap resamples, at least 1.
    """

    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples={self.resamples} must be at least 1: 1000 is usual")

    def measure(self, features: FeatureSet, *, on_progress: OnProgress = ignore_progress) -> dict[str, Any]:
        """Return accuracies of the reported split as fractions, and the 95 % interval [low, high] of top1."""
        split, images, labels = features.reported()
        scores = centroid_scores(features.train, features.train_labels, images, num_classes=features.num_classes)
        rank = label_rank(scores, labels)  # (m,), 0 = correct
        interval = bootstrap_interval(rank == 0, seed=self.seed, resamples=self.resamples)
        return {
            "protocol": "centroid",
            "split": split,
            "top1": accuracy(rank, 1),
            "top5": top5(rank, features.num_classes),
            "interval": list(interval),
            "n_train": len(features.train),
            "n_test": len(images),
            "num_classes": features.num_classes,
            "seed": self.seed,
        }
