"""Utility of pre-training: the relative number of labels that it saves, for each number of labels n.

The definition is from Newell and Deng 2020, "How Useful is Self-Supervised Pretraining for Visual Tasks?",
arXiv:2003.14323, section 3. With n labels, A_p(n) is the accuracy after pre-training, and A_s(n) is the accuracy of
training from scratch:

    n_hat(n) = smallest number of labels with A_s >= A_p(n)         U(n) = n_hat(n) / n - 1

A utility of 0 means no benefit. A utility of 1 means that training from scratch needs twice as many labels. A negative
value means that pre-training reduces the accuracy. Yaml: conf/protocol/utility.yaml.

Both accuracies are measured for several numbers of labels ("counts") and S seeds. The mean curve is A_s at each count,
averaged over the seeds. There are two methods to compute n_hat from the mean curve ("inversions"):

- "linear" is the method of the official code,
  https://github.com/princeton-vl/selfstudy/blob/d07ec91/util/vis.py#L377-L394. The mean curve is interpolated linearly
  in n. n_hat is computed for each seed of A_p, and the utility is the mean over the seeds.
- "log" first makes the mean curve non-decreasing (isotonic regression), and then interpolates it linearly in ln n.
  n_hat is computed once, for the mean of A_p over the seeds.

"linear" departs from the official code as follows:

- If A_p of a seed is below the value of the mean curve at the smallest count, n_hat is the smallest count, as an
  upper bound. The official code sets n_hat to 0.
- If A_p of a seed is above all values of the mean curve, n_hat is the largest count, as a lower bound. The official
  code sets n_hat to -1.
- The utility is reported for all counts. The official code stops at the first count at which the mean of A_p over the
  seeds is above all values of the mean curve. Instead of the utility at this count, it reports the utility at
  the number of labels that `crossing` returns.
- The utility at this number of labels is also n_hat / n - 1. The official code does not subtract 1 from this utility.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, ClassVar

import torch

from sslcli.evaluation.base import Outcome, trained_and_measured
from sslcli.evaluation.finetune import Plan, Tuned
from sslcli.evaluation.result import bootstrap_runs
from sslcli.evaluation.subsets import log_spaced, subset
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.variants import join_parts
from sslcli.report.svg_plot import curves


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Return the non-decreasing weighted least-squares fit to `values`, computed by pool adjacent violators (PAVA).

    The algorithm is from Barlow, Bartholomew, Bremner and Brunk 1972. `weights` must be positive (default: all 1).
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
    """Number of labels that training from scratch needs to reach an accuracy.

    If `bound` is "lower" or "upper", `labels` is only a lower or an upper bound of this number. If `bound` is "mixed",
    `labels` is a mean over seeds, some with a lower and some with an upper bound. If `bound` is None, `labels` is the
    number itself.
    """

    labels: float
    bound: str | None = None


def needed(accuracy: float, counts: Sequence[int], scratch: Sequence[float]) -> Need:
    """Return the number of labels with which training from scratch reaches `accuracy`.

    Let A_s(n) be the accuracy of training from scratch with n labels. The result is inf{n : A_s(n) >= accuracy}.
    `scratch` contains A_s at each number of labels in `counts`, and must be non-decreasing. Between two counts, A_s is
    interpolated linearly in ln n.

    If `accuracy` is above all values in `scratch`, the result is the largest count, as a lower bound. If `accuracy` is
    below all values, the result is the smallest count, as an upper bound.
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
    """Return the utility U(n) and the `Need` from which it is computed, for each number of labels n in `counts`.

    U(n) is `labels` of the `Need`, divided by n, minus 1. `trained` contains the mean accuracy of pre-trained networks
    at each of `counts`, and `scratch` contains the mean accuracy of training from scratch. `scratch` is first made
    non-decreasing.
    """
    monotone = isotonic(scratch)
    needs = [needed(accuracy, counts, monotone) for accuracy in trained]
    return [(need.labels / n - 1, need) for n, need in zip(counts, needs, strict=True)]


def needed_linear(accuracy: float, counts: Sequence[int], scratch: Sequence[float]) -> Need:
    """Return the number of labels with which training from scratch reaches `accuracy`, interpolated linearly in n.

    `scratch` contains the accuracy of training from scratch at each of `counts`. The values may decrease. As in the
    official code, the interpolation is between the first count with a larger accuracy than `accuracy` and the count
    before it. If `accuracy` is above all values in `scratch` or below the first value, the result is a bound, as in
    `needed`.
    """
    best = max(scratch)
    if accuracy >= best:
        return Need(float(counts[-1]), "lower") if accuracy > best else Need(float(counts[scratch.index(best)]))
    place = next(i for i, reached in enumerate(scratch) if reached > accuracy)
    if place == 0:
        return Need(float(counts[0]), "upper")
    fraction = (accuracy - scratch[place - 1]) / (scratch[place] - scratch[place - 1])
    return Need(counts[place - 1] + fraction * (counts[place] - counts[place - 1]))


def utilities_by_seed(
    counts: Sequence[int], trained: torch.Tensor, scratch: torch.Tensor
) -> list[tuple[float, Need, list[float]]]:
    """Return the utility U(n), the mean `Need`, and the utility of every seed, for each number of labels n in `counts`.

    A `Need` contains the number of labels with which training from scratch reaches the accuracy that fine-tuning
    reaches with n labels. U(n) is this number divided by n, minus 1.

    `trained` contains the accuracies of fine-tuning, and `scratch` those of training from scratch. Both have the shape
    (counts, S), where S is the number of seeds. First, the values in `scratch` are averaged over the seeds. Then one
    `Need` is computed for each seed, from the accuracy of fine-tuning with this seed. The field `labels` of the mean
    `Need` is the mean of `labels` over the seeds. U(n) is computed from this mean.
    """
    curve = scratch.mean(1).tolist()
    found = []
    for n, accuracies in zip(counts, trained.tolist(), strict=True):
        needs = [needed_linear(accuracy, counts, curve) for accuracy in accuracies]
        bounds = {need.bound for need in needs} - {None}
        need = Need(fmean(need.labels for need in needs), "mixed" if len(bounds) > 1 else next(iter(bounds), None))
        found.append((need.labels / n - 1, need, [need.labels / n - 1 for need in needs]))
    return found


def crossing(counts: Sequence[int], trained: Sequence[float], scratch: Sequence[float]) -> dict[str, float] | None:
    """Return the number of labels with which fine-tuning reaches the best accuracy of training from scratch.

    The utility of pre-training at this number of labels is also returned.

    `trained` and `scratch` contain the mean accuracies of fine-tuning and of training from scratch for each number of
    labels in `counts`. `trained` is interpolated linearly between the numbers of labels. Below the smallest number, the
    interpolation starts at accuracy 0 with 0 labels. The utility is m / labels - 1. Here `labels` is the
    returned number of labels, and m is the number of labels with which training from scratch reaches its best accuracy.
    Returns None if fine-tuning does not exceed this best accuracy.
    """
    best = max(scratch)
    place = next((i for i, accuracy in enumerate(trained) if accuracy > best), None)
    if place is None:
        return None
    low, accuracy = (0, 0.0) if place == 0 else (counts[place - 1], trained[place - 1])
    labels = low + (counts[place] - low) * (best - accuracy) / (trained[place] - accuracy)
    return {"labels": labels, "utility": counts[scratch.index(best)] / labels - 1}


def linear_inversion(counts: Sequence[int], trained: torch.Tensor, scratch: torch.Tensor) -> list[tuple[float, Need]]:
    """Return the utility U(n) of pre-training and a `Need`, for each number of labels n in `counts`.

    The `Need` is the number of labels with which training from scratch reaches the accuracy after pre-training, or a
    bound of this number. Both values are computed by the method "linear", see the module docstring. `trained` and
    `scratch` (counts, S) contain the accuracies after pre-training and from scratch, for S seeds.
    """
    return [(value, need) for value, need, _ in utilities_by_seed(counts, trained, scratch)]


def log_inversion(counts: Sequence[int], trained: torch.Tensor, scratch: torch.Tensor) -> list[tuple[float, Need]]:
    """Return the utility U(n) of pre-training and a `Need`, for each number of labels n in `counts`.

    The `Need` is the number of labels with which training from scratch reaches the accuracy after pre-training, or a
    bound of this number. Both values are computed by the method "log", see the module docstring. `trained` and
    `scratch` (counts, S) contain the accuracies after pre-training and from scratch, for S seeds.
    """
    return utilities(counts, trained.mean(1).tolist(), scratch.mean(1).tolist())


INVERSIONS = {"linear": linear_inversion, "log": log_inversion}


def bootstrap_utilities(
    counts: Sequence[int],
    trained: torch.Tensor,
    scratch: torch.Tensor,
    *,
    seed: int,
    resamples: int,
    inversion: str = "log",
) -> list[list[float | None]]:
    """Return a 95 % bootstrap interval [low, high] of the utility at each of `counts`.

    `trained` and `scratch` contain accuracies (counts, seeds). The seeds are resampled. Each resample uses the same
    seeds for `trained` and `scratch`, because a seed determines which images are labeled.

    The utility is computed from a `Need`: the number of labels with which training from scratch reaches the accuracy of
    fine-tuning. If the field `bound` of the `Need` is "lower" or "mixed", the utility of the resample has no known
    upper bound. If this is the case in more than 2.5 % of the resamples, `high` is None.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds = trained.shape[1]
    drawn: list[list[tuple[float, Need]]] = []
    for _ in range(resamples):
        chosen = torch.randint(seeds, (seeds,), generator=generator)
        drawn.append(INVERSIONS[inversion](counts, trained[:, chosen], scratch[:, chosen]))
    intervals: list[list[float | None]] = []
    for at_count in zip(*drawn, strict=True):
        values = torch.tensor([value for value, _ in at_count], dtype=torch.float64)
        low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        open_ended = sum(need.bound in ("lower", "mixed") for _, need in at_count) > 0.025 * resamples
        intervals.append([low, None if open_ended else high])
    return intervals


@dataclass(frozen=True, kw_only=True)
class Utility(Tuned):
    """The protocol `utility`: fine-tuning and training from scratch on nested label subsets.

    Fine-tuning and training from scratch are the two arms. Both arms have the same number of steps and the same
    learning rate grid. The sizes of the subsets are log-spaced.
    """

    shares_work: ClassVar[bool] = True
    named: ClassVar[dict[str, Any]] = {
        "seeds": 3,
        "seed": 0,
        "steps": 100,
        "warm_start": False,
        "batch_norm": "train",
        "inversion": "log",  # not the value of the yaml file: results of version 0.2 are of "log"
    }

    smallest: int = 90
    points: int = 4
    seeds: int = 3
    inversion: str = "log"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inversion not in INVERSIONS:
            raise ValueError(f"inversion={self.inversion!r} is unknown: choose {' or '.join(INVERSIONS)}")
        log_spaced(self.smallest, self.smallest + 1, self.points)
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1: 3 to 5 are usual")

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the result's name: the settings that differ from the defaults of version 0.2.

        Version 0.2 had no setting `inversion`. It always used the method "log", which therefore counts as the default.
        """
        smallest = f"from-{self.smallest}" if self.smallest != Utility.smallest else ""
        points = f"{self.points}-points" if self.points != Utility.points else ""
        return join_parts(smallest, points, super().variant(monitor))

    def description(self, result: Mapping[str, Any]) -> str:
        """Return how the utility was estimated."""
        how = {
            "linear": "as in the official code, linearly in the number of labels and for each seed",
            "log": "linearly in the logarithm of the number of labels, from the means over the seeds",
        }[self.inversion]
        return (
            f"fine-tuning of the whole network for {self.steps:,} steps, {trained_and_measured(result)}: compare with "
            f"the random initialization, which has the same steps; the utility is estimated {how}"
        )

    def __call__(self, starts: Mapping[str, Start], task: Task) -> Outcome:
        """Evaluate the pre-trained network and the network that is trained from scratch at every label count.

        Raises ValueError if `starts` has no entry "random", which is trained from scratch.
        """
        if "random" not in starts:
            raise ValueError("utility compares with training from scratch, so it needs baselines=true")
        data = starts["trained"].features
        assert data.train_positions is not None
        total = len(data.train)
        counts = log_spaced(self.smallest, total, self.points)
        subsets = [
            [
                subset(data.train_positions, data.train_labels, seed=self.seed + number, fraction=count / total)
                for number in range(self.seeds)
            ]
            for count in counts
        ]
        plans = [Plan(start=start, subsets=rows) for rows in subsets for start in starts.values()]
        results = iter(self.learn(plans, task, title="utility")[0])
        points, places = [], {}
        for rows in subsets:
            point: dict[str, Any] = {"labels": len(rows[0])}
            for arm in starts:
                found = next(results)
                top1 = found.top(1, num_classes=data.num_classes)
                deviation = stdev(top1) if len(top1) > 1 else None
                point[arm] = {"top1": fmean(top1), "std": deviation, "runs": top1, "chosen": found.chosen}
                places[arm] = found.place
            points.append(point)
        self.add_utilities(points)
        last = points[-1]
        means = ([point[arm]["top1"] for point in points] for arm in ("trained", "random"))
        result = {
            "protocol": "utility",
            "split": data.reported()[0],
            "top1": last["trained"]["top1"],
            "interval": self.interval(places["trained"]),
            "inversion": self.inversion,
            "curve": points,
            "crossing": crossing([point["labels"] for point in points], *means),
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
        """Add the utility of pre-training and its confidence interval to each of `points`.

        A point contains the accuracies for one number of labels. The utility may be only a lower or an upper bound. The
        field `bound` of the point states this.
        """
        counts = [point["labels"] for point in points]
        runs = {
            arm: torch.tensor([p[arm]["runs"] for p in points], dtype=torch.float64) for arm in ("trained", "random")
        }
        arms = runs["trained"], runs["random"]
        found = INVERSIONS[self.inversion](counts, *arms)
        intervals = bootstrap_utilities(
            counts, *arms, seed=self.seed, resamples=self.resamples, inversion=self.inversion
        )
        for point, (value, need), interval in zip(points, found, intervals, strict=True):
            point["utility"] = value
            point["scratch_labels"] = need.labels
            point["bound"] = need.bound
            point["censored"] = need.bound == "lower"
            point["utility_interval"] = interval
        if self.inversion == "linear":
            for point, (*_, values) in zip(points, utilities_by_seed(counts, *arms), strict=True):
                point["utility_runs"] = values
