"""Accuracies and bootstrap confidence intervals of evaluation results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def label_rank(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of the true class in each row of `scores` (m, C), as (m,) int64. The best rank is 0.

    Classes with equal scores are ranked by class index. A row with a NaN or infinite score gets rank C, so it counts as
    wrong for every k.
    """
    num_classes = scores.shape[1]
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(num_classes, device=scores.device) < labels[:, None]
    place = ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
    return torch.where(torch.isfinite(scores).all(dim=1), place, num_classes)


def accuracy(place: Tensor, k: int) -> float:
    """Return the top-k accuracy in [0, 1]. `place` (m,) are the ranks of the true classes (see `label_rank`)."""
    return int((place < k).sum()) / len(place)


def top5(place: Tensor, num_classes: int) -> float:
    """Return the top-5 accuracy in [0, 1], or the top-C accuracy if there are C < 5 classes.

    `place` (m,) is the result of `label_rank`: the 0-based rank of the true class of each image. Rank C, the rank if
    the scores are not finite, counts as wrong.
    """
    return accuracy(place, min(5, num_classes))


def best(grid: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the best entry of a hyperparameter grid.

    The entry with the highest held-out accuracy `val_top1` is the best. With few held-out images, many entries have the
    same accuracy. Of these, the entry with the lowest held-out loss `val_loss` is the best.
    """
    return max(range(len(grid)), key=lambda number: (grid[number]["val_top1"], -grid[number]["val_loss"]))


def bootstrap_interval(
    correct: Tensor, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (low, high) of the mean of `correct` (m,) bool, as fractions.

    The mean of a resample of size m depends only on its number of correct images. This number has the distribution
    Binomial(m, mean), and it is drawn directly from this distribution. Drawing m indices for each of `resamples`
    resamples would be equivalent (Efron and Tibshirani, 1993, ch. 13).
    """
    if correct.ndim != 1 or len(correct) == 0:
        raise ValueError(f"correct has shape {tuple(correct.shape)}, but must be (m,) with at least one image")
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1: 1000 is usual")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1: 0.95 is usual")
    generator = torch.Generator().manual_seed(seed)
    m = len(correct)
    mean = float(correct.sum()) / m
    hits = torch.binomial(
        torch.full((resamples,), float(m), dtype=torch.float64),
        torch.full((resamples,), mean, dtype=torch.float64),
        generator=generator,
    )
    tail = (1 - level) / 2
    low, high = torch.quantile(hits / m, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def bootstrap_runs(correct: Tensor, *, seed: int, resamples: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval (low, high) of the mean of `correct` (S runs, m images) bool.

    Both runs and images are resampled, so the interval covers the variance over runs and over images. All runs of a
    resample use the same images. With few runs, the interval is too narrow, because resampling a few runs
    underestimates the variance over runs.
    """
    if correct.ndim != 2 or correct.numel() == 0:
        raise ValueError(f"correct has shape {tuple(correct.shape)}, but must be (runs, images), at least one of each")
    generator = torch.Generator().manual_seed(seed)
    runs, images = correct.shape
    hits = correct.cpu().double()
    means = torch.empty(resamples, dtype=torch.float64)
    for number in range(resamples):
        times = torch.bincount(torch.randint(images, (images,), generator=generator), minlength=images).double()
        drawn = torch.randint(runs, (runs,), generator=generator)
        means[number] = (hits @ times)[drawn].mean() / images
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
