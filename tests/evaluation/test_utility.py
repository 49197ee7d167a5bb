"""Utility of pre-training in labels: isotonic regression, inversion, bounds, and the whole study."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from learnable import Colors, start_of, task_of
from sslcli.evaluation.utility import (
    Need,
    Utility,
    bootstrap_utilities,
    crossing,
    isotonic,
    needed,
    needed_linear,
    utilities,
    utilities_by_seed,
)
from tiny import TinyNet

COUNTS = [round(100 * 2 ** (k / 8)) for k in range(57)]  # 100 to 12,800, so dense that lines between are exact enough


def scratch(n: float) -> float:
    return 0.9 - 2.0 * n**-0.5


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_regression_equals_that_of_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(20, generator=generator) + torch.arange(20) / 8).tolist()
    weights = torch.randint(1, 5, (20,), generator=generator).double().tolist()
    wanted = IsotonicRegression().fit_transform(list(range(20)), values, sample_weight=weights)
    assert isotonic(values, weights) == pytest.approx(wanted.tolist())
    assert isotonic(values) == pytest.approx(IsotonicRegression().fit_transform(list(range(20)), values).tolist())


def test_isotonic_regression_is_the_nearest_monotone_sequence() -> None:
    values = [0.3, 0.1, 0.6, 0.5, 0.2]
    grid = [step / 60 for step in range(0, 61, 2)]
    best = min(
        (sum((a - b) ** 2 for a, b in zip(values, candidate, strict=True)))
        for candidate in itertools.combinations_with_replacement(grid, 5)
    )
    found = isotonic(values)
    assert found == sorted(found)
    assert sum((a - b) ** 2 for a, b in zip(values, found, strict=True)) == pytest.approx(best, abs=2e-3)
    assert isotonic([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]


def test_a_net_that_is_worth_twice_the_labels_has_utility_one() -> None:
    found = utilities(COUNTS, [scratch(2 * n) for n in COUNTS], [scratch(n) for n in COUNTS])
    inside = [(value, need) for n, (value, need) in zip(COUNTS, found, strict=True) if 2 * n <= COUNTS[-1]]
    assert len(inside) > 40
    for value, need in inside:
        assert need.bound is None
        assert value == pytest.approx(1.0, abs=1e-3)


def test_the_same_curve_twice_has_utility_zero() -> None:
    accuracies = [scratch(n) for n in COUNTS]
    for value, need in utilities(COUNTS, accuracies, accuracies):
        assert value == pytest.approx(0.0, abs=1e-12)
        assert need.bound is None


def test_what_scratch_never_reaches_is_a_lower_bound_and_what_it_always_exceeds_an_upper_one() -> None:
    counts, base = [10, 100, 1000], [0.2, 0.4, 0.6]
    found = utilities(counts, [0.1, 0.7, 0.6], base)
    assert [(value, need.bound) for value, need in found] == [(0.0, "upper"), (9.0, "lower"), (0.0, None)]


def test_between_counts_the_line_is_in_the_logarithm() -> None:
    assert needed(0.3, [10, 1000], [0.2, 0.4]).labels == pytest.approx(100)
    assert needed(0.2, [10, 1000], [0.2, 0.4]) == needed(0.2, [10, 20, 1000], [0.2, 0.2, 0.4])


def test_a_dip_in_the_curve_from_scratch_is_smoothed_before_it_is_inverted() -> None:
    counts = [10, 100, 1000]
    found = utilities(counts, [0.45, 0.45, 0.8], [0.5, 0.4, 0.8])  # as a noisy run may have it
    assert [value for value, _ in found] == pytest.approx([0.0, -0.9, 0.0])


def test_intervals_come_from_drawing_seeds_and_are_open_where_bounds_are() -> None:
    counts = [10, 100, 1000]
    base = torch.tensor([[0.2, 0.3], [0.4, 0.5], [0.6, 0.7]], dtype=torch.float64)
    same = bootstrap_utilities(counts, base, base, seed=0, resamples=50)
    assert same == [[pytest.approx(0.0), pytest.approx(0.0)]] * 3
    better = bootstrap_utilities(counts, base + torch.tensor([0.05, 0.12]), base, seed=0, resamples=200)
    low, high = better[0]
    assert 0 < low < high
    assert better[2][1] is None
    assert bootstrap_utilities(counts, base + 0.05, base, seed=0, resamples=5) == bootstrap_utilities(
        counts, base + 0.05, base, seed=0, resamples=5
    )


def official_x(counts: list[int], curve: list[float], y: float) -> float:
    """The number of labels of the official code, https://github.com/princeton-vl/selfstudy util/vis.py."""
    for place, reached in enumerate(curve):
        if reached > y:
            share = (y - curve[place - 1]) / (reached - curve[place - 1])
            return counts[place - 1] + share * (counts[place] - counts[place - 1]) if place else 0.0
    return -1.0


def test_the_linear_inversion_equals_the_official_code_inside_the_curve() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [100, 250, 1000, 4000, 20000]
    base = (
        torch.rand(5, 3, dtype=torch.float64, generator=generator) / 10 + torch.arange(5)[:, None] / 5
    )  # may decrease
    trained = base[:4] + torch.rand(4, 3, dtype=torch.float64, generator=generator) / 10
    curve = base.mean(1).tolist()
    compared = 0
    for n, accuracies, (value, need, runs) in zip(
        counts, trained.tolist(), utilities_by_seed(counts, torch.cat([trained, base[4:]]), base), strict=False
    ):
        official = [official_x(counts, curve, accuracy) / n - 1 for accuracy in accuracies]
        inside = [curve[0] <= accuracy < max(curve) for accuracy in accuracies]
        assert [one for one, known in zip(runs, inside, strict=True) if known] == pytest.approx(
            [one for one, known in zip(official, inside, strict=True) if known]
        )
        if all(inside):
            compared += 1
            assert (value, need.bound) == (pytest.approx(sum(official) / 3), None)
    assert compared >= 3


def test_the_linear_inversion_takes_the_mean_of_the_seeds_and_marks_bounds() -> None:
    counts = [10, 100, 1000]
    base = torch.tensor([[0.2], [0.4], [0.6]], dtype=torch.float64)
    trained = torch.tensor([[0.3, 0.5], [0.7, 0.5], [0.1, 0.7]], dtype=torch.float64)
    (first, need, runs), (second, lower, _), (_, mixed, _) = utilities_by_seed(counts, trained, base)
    assert runs == pytest.approx([4.5, 54.0])  # 55 and 550 labels
    assert (first, need.bound) == (pytest.approx(29.25), None)
    assert (second, lower.bound) == (pytest.approx((1000 + 550) / 2 / 100 - 1), "lower")
    assert mixed == Need((10 + 1000) / 2, "mixed")
    assert needed_linear(0.6, counts, [0.2, 0.4, 0.6]) == Need(1000.0)
    assert needed_linear(0.1, counts, [0.2, 0.4, 0.6]) == Need(10.0, "upper")


def test_the_crossing_is_where_fine_tuning_reaches_the_best_accuracy_of_scratch() -> None:
    assert crossing([10, 100, 1000], [0.2, 0.5, 0.7], [0.1, 0.4, 0.6]) == {
        "labels": pytest.approx(550.0),
        "utility": pytest.approx(1000 / 550 - 1),
    }
    assert crossing([10, 100], [0.8, 0.9], [0.1, 0.4]) == {"labels": pytest.approx(5.0), "utility": pytest.approx(19.0)}
    assert crossing([10, 100], [0.2, 0.4], [0.1, 0.4]) is None


SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 8, "lrs": [0.5], "smallest": 6, "points": 3, "seeds": 2}


@pytest.mark.parametrize("inversion", ["linear", "log"])
def test_the_study_measures_both_arms_on_nested_subsets_and_draws_them(inversion: str) -> None:
    task = task_of(Colors())
    torch.manual_seed(0)
    starts = {"trained": start_of(TinyNet(), task), "random": start_of(TinyNet(), task)}
    protocol = Utility(**SETTINGS, resamples=20, inversion=inversion)
    found = protocol(starts, task)
    how = {"linear": "for each seed", "log": "in the logarithm of the number of labels"}[inversion]
    assert how in protocol.description(found.result)
    curve = found.result["curve"]
    assert [point["labels"] for point in curve] == [6, 18, 60]
    for point in curve:
        for arm in ("trained", "random"):
            assert point[arm]["top1"] == pytest.approx(sum(point[arm]["runs"]) / 2)
        assert point["utility"] == pytest.approx(point["scratch_labels"] / point["labels"] - 1)
        assert point["censored"] == (point["bound"] == "lower")
        if inversion == "linear":
            assert point["utility"] == pytest.approx(sum(point["utility_runs"]) / 2)
    assert found.result["top1"] == curve[-1]["trained"]["top1"]
    assert ET.fromstring(found.files["utility.svg"]).tag.endswith("svg")
    with pytest.raises(ValueError, match="baselines=true"):
        Utility(**SETTINGS)({"trained": starts["trained"]}, task)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"points": 1}, "points"),
        ({"smallest": 0}, "smallest"),
        ({"seeds": 0}, "seeds=0"),
        ({"inversion": "cubic"}, "choose linear or log"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Utility(**settings)


def test_results_of_the_earlier_inversion_keep_their_names() -> None:
    assert Utility(inversion="log", steps=100).variant({}) == ""
    assert (
        Utility(inversion="linear", steps=100, smallest=20, points=2).variant({}) == "from-20_2-points_inversion-linear"
    )
