"""Fine-tuning and few labels on a set that can be learnt in moments."""

from __future__ import annotations

import copy
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.finetune import Finetune
from sslcli.evaluation.linear import Linear
from sslcli.evaluation.result import bootstrap_interval, bootstrap_runs
from sslcli.evaluation.semi import Semi
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.training import Recipe, fit, predict, warm
from sslcli.report.console import Progress, Screen

QUICK: dict[str, Any] = {"steps": 12, "batch_size": 16, "lrs": [0.1, 1.0]}


def bits(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_whole_net_is_trained_and_the_start_is_left_as_it_is(task: Task, starts: dict[str, Start]) -> None:
    before = bits(starts["trained"].net)
    found = Finetune(**QUICK)(starts, task)
    assert same(bits(starts["trained"].net), before)
    assert found.net is not None
    after = found.net.net.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in before)
    result = found.result
    assert result["top1"] > 0.6 > 1 / 3
    assert result["interval"][0] <= result["top1"] <= result["interval"][1]
    assert {"top1", "top5", "interval", "chosen"} == result["baselines"]["random"].keys()
    assert [entry["lr"] for entry in result["grid"]] == [0.1, 1.0]
    assert result["chosen"] in result["grid"]


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator(task: Task, starts: dict[str, Start]) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(Finetune(**QUICK)(starts, task))
    other = Finetune(**QUICK, seed=1)(starts, task)
    assert found[0].result == found[1].result
    assert same(bits(found[0].net), bits(found[1].net))
    assert not same(bits(found[0].net), bits(other.net))


def test_the_choice_does_not_look_at_the_test_split(task: Task, starts: dict[str, Start]) -> None:
    one = Finetune(**QUICK)(starts, task)
    data = vars(starts["trained"].features)
    wrong = FeatureSet(**data | {"test_labels": (data["test_labels"] + 1) % 3})
    blind = Start(net=starts["trained"].net, layer="backbone", features=wrong)
    two = Finetune(**QUICK)({"trained": blind}, task)
    assert (one.result["grid"], one.result["chosen"]) == (two.result["grid"], two.result["chosen"])
    assert same(bits(one.net), bits(two.net))
    assert one.result["top1"] != two.result["top1"]


def test_every_test_image_is_predicted_once_for_each_subset(
    task: Task, starts: dict[str, Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(net: nn.Module, task: Task, positions: Tensor) -> Tensor:
        seen.append(positions.tolist())
        return predict(net, task, positions)

    monkeypatch.setattr("sslcli.evaluation.finetune.predict", noted)
    Finetune(**QUICK)({"trained": starts["trained"]}, task)
    test = task.source.splits["test"].tolist()
    assert seen.count(test) == 1
    assert not any(set(test) & set(positions) for positions in seen if positions != test)


def test_the_warm_head_is_the_linear_probe_of_the_features_as_they_are(task: Task, starts: dict[str, Start]) -> None:
    start = starts["trained"]
    data = start.features
    net = start.classifier(task)
    chosen = warm(net, data.train, data.train_labels, seed=0)
    logits = predict(net, task, data.test_positions)
    probe = Linear().fit(data.train, data.train_labels, data.test, data.test_labels, num_classes=3)
    assert chosen == probe.chosen
    assert float((logits.argmax(1) == data.test_labels).float().mean()) == pytest.approx(probe.top1)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batchnorm_keeps_its_statistics_where_it_is_told_to(mode: str, task: Task, starts: dict[str, Start]) -> None:
    net = starts["trained"].classifier(task)
    before = net.net.norm.running_mean.clone()
    recipe = Recipe(steps=2, batch_size=8, batch_norm=mode)
    fit(net, task, torch.arange(30), recipe, lr=0.1, seed=0, progress=Progress(Screen(silent=True), "", total=2))
    assert torch.equal(net.net.norm.running_mean, before) == (mode == "eval")


def test_a_rate_that_diverges_is_not_chosen(task: Task, starts: dict[str, Start]) -> None:
    result = Finetune(**QUICK | {"lrs": [1e30, 0.1], "steps": 40})({"trained": starts["trained"]}, task).result
    assert result["grid"][0]["val_top1"] == 0.0
    assert result["chosen"]["lr"] == 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_layer_decay_near_zero_trains_the_head_alone(optimizer: str, task: Task, starts: dict[str, Start]) -> None:
    start = starts["trained"]
    settings = QUICK | {"lrs": [0.1], "optimizer": optimizer, "batch_norm": "eval"}
    found = Finetune(**settings, layer_decay=1e-30)({"trained": start}, task)
    torch.testing.assert_close(bits(found.net.net), bits(start.net), rtol=0, atol=1e-20)
    assert found.net.classify.weight.any()


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
        ({"optimizer": "lars"}, "sgd or adamw"),
        ({"batch_norm": "off"}, "train or eval"),
        ({"lrs": []}, "at least one"),
        ({"lrs": [0.1, 0.0]}, "above 0"),
        ({"steps": 0}, "steps=0"),
        ({"layer_decay": 0.0}, "0.65 to 0.75"),
        ({"momentum": 1.0}, r"\[0, 1\)"),
        ({"weight_decay": -1.0}, "at least 0"),
        ({"crop_scale": [0.5, 2.0]}, "crop_scale"),
        ({"val_fraction": 1.0}, "between 0 and 1"),
        ({"from_layer": -1}, "the backbone"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Finetune(**settings)


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


def test_the_interval_of_runs_is_that_of_images_where_all_runs_agree_and_wider_where_they_do_not() -> None:
    right = torch.arange(400) % 4 != 0
    agree = bootstrap_runs(right.expand(5, -1), seed=0)
    assert agree == pytest.approx(bootstrap_interval(right, seed=0), abs=0.01)
    apart = torch.stack([right, ~right, right, ~right])
    low, high = bootstrap_runs(apart, seed=0)
    assert low < 0.35 < 0.65 < high
    with pytest.raises(ValueError, match="runs, images"):
        bootstrap_runs(right, seed=0)
