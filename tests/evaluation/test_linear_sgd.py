"""The published linear protocol: a linear classifier on a frozen network, trained on random crops."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnable import Colors, start_of, task_of
from sslcli.errors import ConfigError
from sslcli.evaluation.linear_sgd import LinearSgd
from sslcli.evaluation.result import label_rank
from sslcli.evaluation.task import Start, Task
from sslcli.evaluation.training import batches, views_of
from sslcli.nn.modes import evaluating
from tiny import TinyNet, copied_state, equal_states

QUICK: dict[str, Any] = {"epochs": 5, "batch_size": 16, "lrs": [0.5, 8.0], "resamples": 20}


def trained_by_torch(protocol: LinearSgd, start: Start, task: Task, lr: float, kept: Tensor) -> nn.Linear:
    """Train a linear layer with torch's SGD on the crops of the protocol, as the official code does."""
    layer = nn.Linear(8, 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    views = views_of(task, protocol.view())
    loader = batches(task, start.features.train_positions, views, batch_size=protocol.batch_size, seed=protocol.seed)
    total = protocol.epochs * loader.steps_per_epoch
    assert total == protocol.epochs * (60 // protocol.batch_size)
    with evaluating(start.net), closing(loader.steps(0, total)) as steps:
        for step, (batch,) in enumerate(steps):
            with torch.no_grad():
                x = start.net(batch.views[0])
            rows = torch.isin(batch.index, kept)
            optimizer.param_groups[0]["lr"] = lr * protocol.factor(step, total=total)
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), batch.label[rows]).backward()
            optimizer.step()
    return layer


def test_classifiers_equal_those_that_torch_trains_one_by_one(task: Task, starts: dict[str, Start]) -> None:
    protocol, start = LinearSgd(**QUICK), starts["trained"]
    labels = start.features.train_labels
    kept, out = protocol.split(labels)
    assert torch.bincount(labels[out]).tolist() == [2, 2, 2]
    probe = protocol.train("trained", start, task, kept)
    for rows, (weight, bias) in ((torch.arange(60), probe.reported), (kept, probe.selecting)):
        for number, lr in enumerate(protocol.lrs):
            layer = trained_by_torch(protocol, start, task, lr * 16 / 256, rows)
            columns = slice(3 * number, 3 * number + 3)
            torch.testing.assert_close(weight[:, columns], layer.weight.detach().T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bias[columns], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_the_learning_rate_is_selected_on_held_out_images_and_reported_on_test(
    task: Task, starts: dict[str, Start]
) -> None:
    protocol, start = LinearSgd(**QUICK), starts["trained"]
    result = protocol(starts, task).result
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["protocol"], result["split"], result["n_train"], result["n_test"]) == ("linear_sgd", "test", 60, 30)
    best = max(result["grid"], key=lambda entry: (entry["val_top1"], -entry["val_loss"]))
    assert result["chosen"] == {"lr": best["lr"]}
    assert protocol.description(result) == (
        "linear classifier on a frozen backbone (1 x image size, crop 0.08-1, flip p=0.5), 5 epochs, trained on 60 "
        "training images, measured on 30 images of test: comparable with published linear accuracies of the same "
        "backbone, pre-training and crops"
    )
    layer = trained_by_torch(protocol, start, task, best["lr"] * 16 / 256, torch.arange(60))
    place = label_rank(layer(start.features.test), start.features.test_labels)
    assert result["top1"] == pytest.approx(float((place == 0).double().mean()))
    assert {"top1", "top5", "interval", "chosen"} == result["baselines"]["random"].keys()
    changed = replace(start.features, test=-start.features.test)
    other = protocol.measure("trained", replace(start, features=changed), task)
    assert (other["grid"], other["chosen"]) == (result["grid"], result["chosen"])
    assert other["top1"] != result["top1"]


def test_the_network_is_frozen_in_evaluation_mode(task: Task, starts: dict[str, Start]) -> None:
    start = starts["trained"]
    modes: list[bool] = []
    hook = start.net.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = copied_state(start.net)
    LinearSgd(**QUICK)({"trained": start}, task)
    hook.remove()
    assert set(modes) == {False}
    assert equal_states(before, copied_state(start.net))


def test_features_with_other_scales_are_normalized_by_batch_norm(task: Task) -> None:
    class Scaled(TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * 0.1 + 10

    torch.manual_seed(0)
    start = start_of(Scaled(), task)
    settings = {**QUICK, "lrs": [8.0], "epochs": 30}
    raw = LinearSgd(**settings).measure("trained", start, task)
    found = LinearSgd(**settings, feature_norm="batch_norm").measure("trained", start, task)
    assert raw["top1"] < 0.6 < 0.8 < found["top1"]


def test_one_learning_rate_needs_no_selection(task: Task, starts: dict[str, Start]) -> None:
    result = LinearSgd(**{**QUICK, "lrs": [8.0]})({"trained": starts["trained"]}, task).result
    assert (result["grid"], result["chosen"], result["n_train"]) == ([], {"lr": 8.0}, 60)
    assert "baselines" not in result


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator(task: Task, starts: dict[str, Start]) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(LinearSgd(**QUICK)({"trained": starts["trained"]}, task).result)
    assert found[0] == found[1]
    assert LinearSgd(**QUICK, seed=1)({"trained": starts["trained"]}, task).result["grid"] != found[0]["grid"]


def test_the_step_schedule_of_moco_and_the_cosine() -> None:
    moco = LinearSgd(schedule="step", lrs=[30.0])
    factors = [moco.factor(epoch * 10, total=1000) for epoch in (0, 59, 60, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [LinearSgd().factor(step, total=4) for step in (0, 2)] == pytest.approx([1.0, 0.5])


def test_the_name_has_what_changes_the_quantity() -> None:
    assert LinearSgd().variant({}) == ""
    assert LinearSgd(lrs=[30.0], batch_size=512, schedule="step").variant({}) == "schedule-step"
    changed = LinearSgd(epochs=90, feature_norm="batch_norm", seed=2)
    assert changed.variant({}) == "epochs-90_feature-norm-batch-norm_seed-2"
    assert LinearSgd(crop_scale=[0.08, 1.0]).variant({}) == LinearSgd(crop_scale=(0.08, 1.0)).variant({}) == ""
    assert LinearSgd(crop_scale=[0.5, 1.0], flip=0.0).variant({}) == "crop-scale-0.5-1_flip-0"
    assert LinearSgd(crop_scale=None).variant({}) == "crop-scale-none"


def test_the_memory_bank_has_no_random_crops() -> None:
    task = task_of(Colors())
    with pytest.raises(ConfigError, match="'bank', which has no features of random crops"):
        LinearSgd().choose_layer("bank", TinyNet(), task.example())
    assert LinearSgd().choose_layer("block1", TinyNet(), task.example()) == ("block1", "backbone")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"lrs": []}, "at least one number"),
        ({"lrs": [0.0]}, "all above 0"),
        ({"schedule": "linear"}, "choose cosine or step"),
        ({"feature_norm": "layer"}, "choose none or batch_norm"),
        ({"epochs": 0}, "epochs=0"),
        ({"milestones": [60, 80]}, "fractions"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"crop_scale": [2.0, 3.0]}, "crop_scale"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        LinearSgd(**settings)
