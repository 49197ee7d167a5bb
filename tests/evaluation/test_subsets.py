from __future__ import annotations

import pytest
import torch

from sslcli.evaluation.subsets import held_out, log_spaced, subset

POSITIONS = torch.arange(100, 300)
LABELS = torch.arange(200) % 4


def counts(rows: torch.Tensor) -> list[int]:
    return torch.bincount(LABELS[rows], minlength=4).tolist()


@pytest.mark.parametrize(
    ("settings", "each"),
    [({"fraction": 0.1}, 5), ({"per_class": 7}, 7), ({"fraction": 1e-6}, 1), ({"fraction": 1.0}, 50)],
)
def test_every_class_has_its_share(settings: dict[str, float], each: int) -> None:
    assert counts(subset(POSITIONS, LABELS, seed=0, **settings)) == [each] * 4


def test_subsets_of_a_seed_are_nested_and_those_of_another_seed_differ() -> None:
    sets = [set(subset(POSITIONS, LABELS, seed=3, per_class=n).tolist()) for n in (1, 2, 10, 50)]
    assert sets[0] < sets[1] < sets[2] < sets[3]
    assert set(subset(POSITIONS, LABELS, seed=3, fraction=0.2).tolist()) == sets[2]
    assert set(subset(POSITIONS, LABELS, seed=4, per_class=10).tolist()) != sets[2]


def test_a_subset_depends_on_the_positions_and_not_on_their_order() -> None:
    order = torch.randperm(200)
    one = POSITIONS[subset(POSITIONS, LABELS, seed=0, per_class=5)]
    two = POSITIONS[order][subset(POSITIONS[order], LABELS[order], seed=0, per_class=5)]
    assert set(one.tolist()) == set(two.tolist())


@pytest.mark.parametrize("settings", [{}, {"fraction": 0.1, "per_class": 1}, {"fraction": 0.0}, {"fraction": 1.1}])
def test_what_is_no_subset_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="fraction"):
        subset(POSITIONS, LABELS, seed=0, **settings)


def test_more_labels_than_a_class_has_are_refused() -> None:
    with pytest.raises(ValueError, match="labels_per_class is 51, but class 0 has 50"):
        subset(POSITIONS, LABELS, seed=0, per_class=51)


def test_a_part_of_every_class_is_held_out() -> None:
    rows = subset(POSITIONS, LABELS, seed=0, per_class=10)
    kept, out = held_out(rows, LABELS, fraction=0.2, seed=0)
    assert (counts(kept), counts(out)) == ([8] * 4, [2] * 4)
    assert sorted(torch.cat([kept, out]).tolist()) == rows.tolist()
    kept, out = held_out(rows[:3], LABELS, fraction=0.01, seed=0)
    assert len(torch.unique(LABELS[kept])) == len(torch.unique(LABELS[rows[:3]]))
    single = subset(POSITIONS, LABELS, seed=0, per_class=1)
    assert len(held_out(single, LABELS, fraction=0.5, seed=0)[1]) == 0


def test_label_counts_are_spaced_by_their_logarithm() -> None:
    assert log_spaced(10, 10_000, 4) == [10, 100, 1000, 10_000]
    assert log_spaced(1, 3, 9) == [1, 2, 3]
    for wrong in ((0, 10, 3), (10, 10, 3), (1, 10, 1)):
        with pytest.raises(ValueError, match="smallest"):
            log_spaced(*wrong)
