"""The protocol semi: fine-tuning on few labels."""

from __future__ import annotations

import copy
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from sslcli.evaluation.semi import Semi
from sslcli.evaluation.task import Start, Task

QUICK: dict[str, Any] = {"steps": 12, "batch_size": 16, "lrs": [0.1, 1.0]}


def test_few_labels_give_the_mean_and_deviation_over_seeds(task: Task, starts: dict[str, Start]) -> None:
    protocol = Semi(**QUICK, fraction=None, labels_per_class=4, seeds=3)
    found = protocol(starts, task)
    result = found.result
    top1 = [run["top1"] for run in result["runs"]]
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
    assert (result["top1"], result["std"]) == (fmean(top1), stdev(top1))
    assert result["n_train"] == 12
    assert torch.bincount(task.source.labels[found.positions]).tolist() == [4, 4, 4]
    assert result["interval"][0] <= result["top1"] <= result["interval"][1]
    for arm in (result, result["baselines"]["random"]):
        assert {"top1", "std", "interval"} <= arm["linear"].keys()
    again = protocol(copy.deepcopy(starts), task)
    assert again.result == result


def test_one_seed_has_no_deviation_and_one_label_a_class_no_choice(task: Task, starts: dict[str, Start]) -> None:
    settings = QUICK | {"fraction": None, "labels_per_class": 1, "seeds": 1, "linear": False}
    result = Semi(**settings)({"trained": starts["trained"]}, task).result
    assert (result["std"], result["grid"], result["chosen"]) == (None, [], {"lr": 0.1})
    assert "linear" not in result
    assert "baselines" not in result


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"fraction": None}, "both null"),
        ({"fraction": 1.5}, "at most 1"),
        ({"labels_per_class": 0}, "at least 1"),
        ({"seeds": 0}, "seeds=0"),
    ],
)
def test_subsets_that_cannot_be_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Semi(**settings)
