"""Training loop shared by the protocols that train a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sslcli.evaluation.finetune import Finetune
from sslcli.evaluation.linear import Linear
from sslcli.evaluation.semi import probed
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.training import Recipe, fit, predict, warm
from sslcli.report.console import Progress, Screen
from tiny import copied_state, equal_states

QUICK: dict[str, Any] = {"steps": 12, "batch_size": 16, "lrs": [0.1, 1.0]}


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator(task: Task, starts: dict[str, Start]) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(Finetune(**QUICK)(starts, task))
    other = Finetune(**QUICK, seed=1)(starts, task)
    assert found[0].result == found[1].result
    assert equal_states(copied_state(found[0].net), copied_state(found[1].net))
    assert not equal_states(copied_state(found[0].net), copied_state(other.net))


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


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_layer_decay_near_zero_trains_the_head_alone(optimizer: str, task: Task, starts: dict[str, Start]) -> None:
    start = starts["trained"]
    settings = QUICK | {"lrs": [0.1], "optimizer": optimizer, "batch_norm": "eval"}
    found = Finetune(**settings, layer_decay=1e-30)({"trained": start}, task)
    torch.testing.assert_close(copied_state(found.net.net), copied_state(start.net), rtol=0, atol=1e-20)
    assert found.net.classify.weight.any()


class Head(Exception):
    """Raised instead of fitting a linear probe; names the devices of features and labels."""


def test_linear_probes_are_computed_on_the_device_of_the_task(
    task: Task, starts: dict[str, Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    def head(probe: Linear, x: Tensor, y: Tensor, *, num_classes: int) -> None:
        raise Head(f"{x.device} {y.device}")

    monkeypatch.setattr(Linear, "head", head)
    data, start = starts["trained"].features, starts["trained"]
    with pytest.raises(Head, match="meta meta"):
        probed(data, torch.arange(9), seed=0, device=torch.device("meta"))
    with pytest.raises(Head, match="meta meta"):
        warm(start.classifier(task).to("meta"), data.train, data.train_labels, seed=0)
