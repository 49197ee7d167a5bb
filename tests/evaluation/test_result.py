"""Accuracies and bootstrap intervals."""

from __future__ import annotations

import pytest
import torch

from sslcli.evaluation.result import accuracy, best, bootstrap_interval, bootstrap_runs, label_rank, top5


def test_the_interval_of_runs_is_that_of_images_where_all_runs_agree_and_wider_where_they_do_not() -> None:
    right = torch.arange(400) % 4 != 0
    agree = bootstrap_runs(right.expand(5, -1), seed=0)
    assert agree == pytest.approx(bootstrap_interval(right, seed=0), abs=0.01)
    apart = torch.stack([right, ~right, right, ~right])
    low, high = bootstrap_runs(apart, seed=0)
    assert low < 0.35 < 0.65 < high
    with pytest.raises(ValueError, match="runs, images"):
        bootstrap_runs(right, seed=0)


def test_place_of_the_label_orders_ties_by_class_and_puts_nan_last():
    scores = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [float("nan"), 0.0, 1.0]])
    place = label_rank(scores, torch.tensor([1, 2, 2]))
    assert place.tolist() == [0, 1, 3]
    assert accuracy(place, 1) == pytest.approx(1 / 3)
    assert top5(place, 3) == pytest.approx(2 / 3)


def test_bootstrap_interval_agrees_with_resampled_indices():
    correct = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.7
    low, high = bootstrap_interval(correct, seed=1, resamples=4000)
    index = torch.randint(400, (4000, 400), generator=torch.Generator().manual_seed(2))
    want = torch.quantile(correct.double()[index].mean(dim=1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert (low, high) == pytest.approx(tuple(want.tolist()), abs=5e-3)
    assert bootstrap_interval(correct, seed=1) == bootstrap_interval(correct, seed=1)
    assert bootstrap_interval(torch.ones(9, dtype=torch.bool), seed=0) == (1.0, 1.0)


@pytest.mark.parametrize(("change", "message"), [({"resamples": 0}, "resamples=0"), ({"level": 1.0}, "level=1.0")])
def test_bootstrap_refuses_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(torch.ones(3, dtype=torch.bool), seed=0, **change)
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap_interval(torch.ones(0, dtype=torch.bool), seed=0)


def test_the_best_entry_has_the_highest_accuracy_and_of_equal_ones_the_lowest_loss() -> None:
    pairs = [(0.5, 1.0), (0.7, 3.0), (0.7, 2.0), (0.7, 2.0)]
    assert best([{"val_top1": accuracy, "val_loss": loss} for accuracy, loss in pairs]) == 2
