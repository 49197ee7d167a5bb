"""Utility of pre-training: the relative number of labels that it saves, as a function of the number of labels.

Newell and Deng 2020, "How Useful is Self-Supervised Pretraining for Visual Tasks?", arXiv:2003.14323, section 3.
A_p(n) is the accuracy after pre-training, A_s(n) from scratch, both on n labels:

    n_hat(n) = the fewest labels with which scratch reaches A_p(n)         U(n) = n_hat / n - 1

A utility of 0 means no benefit. With 1, training from scratch needs twice as many labels. A negative value means that
pre-training reduces the accuracy.
Yaml: conf/protocol/utility.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from sslcli.evaluation.base import Outcome
from sslcli.evaluation.finetune import Tuned
from sslcli.evaluation.result import bootstrap_runs
from sslcli.evaluation.subsets import log_spaced, subset
from sslcli.evaluation.task import Start, Task
from sslcli.report.console import Progress
from sslcli.report.svg_plot import curves


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Return the weighted least-squares non-decreasing fit to `values`, by pool adjacent violators (PAVA).

    Barlow, Bartholomew, Bremner and Brunk 1972. `weights` are positive, 1 each by default.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        mean, total, length = float(value), float(weight), 1
        while pools and pools[-1][0] >= mean:
            before, heavy, long = pools.pop()
            mean = (before * heavy + mean * total) / (heavy + total)
            total, length = heavy + total, long + length
        pools.append((mean, total, length))
    return [mean for mean, _, length in pools for _ in range(length)]


@dataclass(frozen=True)
class Need:
    """Number of labels that training from scratch needs for an accuracy.

    It is only a lower or upper bound if `bound` is "lower" or "upper".
    """

    labels: float
    bound: str | None = None


def needed(accuracy: float, counts: Sequence[int], scratch: Sequence[float]) -> Need:
    """Return inf{n : A_s(n) >= accuracy} of a non-decreasing A_s given at `counts`, linear in (ln n, A) between them.

    Outside of the measured range, the result is a bound. For an accuracy above the best one, it is the largest count, a
    lower bound. For an accuracy below the first one, it is the smallest count, an upper bound.
    """
    if accuracy > scratch[-1]:
        return Need(float(counts[-1]), "lower")
    place = next(i for i, reached in enumerate(scratch) if reached >= accuracy)
    if place == 0 or scratch[place] == accuracy:
        return Need(float(counts[place]), "upper" if accuracy < scratch[place] else None)
    fraction = (accuracy - scratch[place - 1]) / (scratch[place] - scratch[place - 1])
    low, high = math.log(counts[place - 1]), math.log(counts[place])
    return Need(math.exp(low + fraction * (high - low)))


def utilities(counts: Sequence[int], trained: Sequence[float], scratch: Sequence[float]) -> list[tuple[float, Need]]:
    """Return U(n) and its `Need` at every count, from mean accuracies; `scratch` is first made non-decreasing."""
    monotone = isotonic(scratch)
    needs = [needed(accuracy, counts, monotone) for accuracy in trained]
    return [(need.labels / n - 1, need) for n, need in zip(counts, needs, strict=True)]


def bootstrap_utilities(
    counts: Sequence[int], trained: torch.Tensor, scratch: torch.Tensor, *, seed: int, resamples: int
) -> list[list[float | None]]:
    """Return 95 % bootstrap intervals [low, high] of U at every count, from accuracies (counts, seeds).

    Seeds are resampled. Both arms use the same resampled seeds, since they have the same labels for a seed. `high` is
    None if U is only a lower bound in more than 2.5 % of the resamples.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds = trained.shape[1]
    drawn: list[list[tuple[float, Need]]] = []
    for _ in range(resamples):
        chosen = torch.randint(seeds, (seeds,), generator=generator)
        means = (part[:, chosen].mean(1).tolist() for part in (trained, scratch))
        drawn.append(utilities(counts, *means))
    intervals: list[list[float | None]] = []
    for at_count in zip(*drawn, strict=True):
        values = torch.tensor([value for value, _ in at_count], dtype=torch.float64)
        low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        open_ended = sum(need.bound == "lower" for _, need in at_count) > 0.025 * resamples
        intervals.append([low, None if open_ended else high])
    return intervals


@dataclass(frozen=True, kw_only=True)
class Utility(Tuned):
    """The protocol `utility`: fine-tuning and training from scratch (the two arms) on nested label subsets.

    The sizes of the subsets are log-spaced. Both arms have the same number of steps and the same learning rate grid.
    """

    smallest: int = 90
    points: int = 4
    seeds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        log_spaced(self.smallest, self.smallest + 1, self.points)
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1: 3 to 5 are usual")

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix with the smallest label count and the number of points, if they are not the defaults."""
        smallest = f"from-{self.smallest}" if self.smallest != Utility.smallest else ""
        points = f"{self.points}-points" if self.points != Utility.points else ""
        return "_".join(part for part in (smallest, points) if part)

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Evaluate both arms at every label count. Raises ValueError if the arm from scratch is missing."""
        if "random" not in starts:
            raise ValueError("utility compares with training from scratch, so it needs baselines=true")
        data = starts["trained"].features
        assert data.train_positions is not None
        total = len(data.train)
        counts = log_spaced(self.smallest, total, self.points)
        trainings = 2 * len(counts) * self.trainings(self.seeds, choosing=1)
        progress = Progress(task.screen, "utility", total=trainings * self.steps)
        points, places = [], {}
        for count in counts:
            subsets = [
                subset(data.train_positions, data.train_labels, seed=self.seed + number, fraction=count / total)
                for number in range(self.seeds)
            ]
            point: dict[str, Any] = {"labels": len(subsets[0])}
            for arm, start in starts.items():
                found = self.learn(start, task, subsets, choosing=1, progress=progress)
                top1 = found.top(1)
                deviation = stdev(top1) if len(top1) > 1 else None
                point[arm] = {"top1": fmean(top1), "std": deviation, "runs": top1, "chosen": found.chosen}
                places[arm] = found.place
            points.append(point)
        task.screen.stop()
        self.add_utilities(points)
        last = points[-1]
        result = {
            "protocol": "utility",
            "split": data.reported()[0],
            "top1": last["trained"]["top1"],
            "interval": self.interval(places["trained"]),
            "curve": points,
            "n_train": last["labels"],
            "n_test": len(data.reported()[1]),
            "num_classes": data.num_classes,
            "baselines": {"random": {"top1": last["random"]["top1"], "interval": self.interval(places["random"])}},
            **self.facts(),
        }
        return Outcome(result=result, net=None, files={"utility.svg": curves(points)})

    def interval(self, place: torch.Tensor) -> list[float]:
        return list(bootstrap_runs(place == 0, seed=self.seed, resamples=self.resamples))

    def add_utilities(self, points: list[dict[str, Any]]) -> None:
        """Add the utility U, its bound and its interval to every point of the curve."""
        counts = [point["labels"] for point in points]
        runs = {
            arm: torch.tensor([p[arm]["runs"] for p in points], dtype=torch.float64) for arm in ("trained", "random")
        }
        found = utilities(counts, runs["trained"].mean(1).tolist(), runs["random"].mean(1).tolist())
        intervals = bootstrap_utilities(
            counts, runs["trained"], runs["random"], seed=self.seed, resamples=self.resamples
        )
        for point, (value, need), interval in zip(points, found, intervals, strict=True):
            point["utility"] = value
            point["scratch_labels"] = need.labels
            point["bound"] = need.bound
            point["censored"] = need.bound == "lower"
            point["utility_interval"] = interval
