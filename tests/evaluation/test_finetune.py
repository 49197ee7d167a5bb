"""Fine-tuning on a set that a tiny network learns in a few steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.finetune import Finetune
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.training import predict
from tiny import copied_state, equal_states

QUICK: dict[str, Any] = {"steps": 12, "batch_size": 16, "lrs": [0.1, 1.0]}


def test_the_whole_net_is_trained_and_the_start_is_left_as_it_is(task: Task, starts: dict[str, Start]) -> None:
    before = copied_state(starts["trained"].net)
    found = Finetune(**QUICK)(starts, task)
    described = (
        "fine-tuning of the whole network for 12 steps, trained on 60 training images, measured on 30 images of test"
    )
    assert (
        Finetune(**QUICK).description(found.result).startswith(f"{described}: compare with the random initialization")
    )
    assert equal_states(copied_state(starts["trained"].net), before)
    assert found.net is not None
    after = found.net.net.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in before)
    result = found.result
    assert result["top1"] > 0.6 > 1 / 3
    assert result["interval"][0] <= result["top1"] <= result["interval"][1]
    assert {"top1", "top5", "interval", "chosen"} == result["baselines"]["random"].keys()
    assert [entry["lr"] for entry in result["grid"]] == [0.1, 1.0]
    assert result["chosen"] in result["grid"]


def test_the_choice_does_not_look_at_the_test_split(task: Task, starts: dict[str, Start]) -> None:
    one = Finetune(**QUICK)(starts, task)
    data = vars(starts["trained"].features)
    wrong = FeatureSet(**data | {"test_labels": (data["test_labels"] + 1) % 3})
    blind = Start(net=starts["trained"].net, layer="backbone", features=wrong)
    two = Finetune(**QUICK)({"trained": blind}, task)
    assert (one.result["grid"], one.result["chosen"]) == (two.result["grid"], two.result["chosen"])
    assert equal_states(copied_state(one.net), copied_state(two.net))
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


def test_a_rate_that_diverges_is_not_chosen(task: Task, starts: dict[str, Start]) -> None:
    result = Finetune(**QUICK | {"lrs": [1e30, 0.1], "steps": 40})({"trained": starts["trained"]}, task).result
    assert result["grid"][0]["val_top1"] == 0.0
    assert result["chosen"]["lr"] == 0.1


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
