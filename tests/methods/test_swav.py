from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from one_run import finish, make_run
from processes import Pair
from sslcli.engine.optim import drop_frozen_gradients, parameter_groups
from sslcli.errors import TrainingFailed
from sslcli.methods.base import Batch
from sslcli.methods.swav import SwAV, swapped_prediction
from sslcli.report.metrics import read
from tiny import Rows, TinyNet, make_batch, mine


def official(case: Case, projector: nn.Module, **options: Any) -> SwAV:
    """The method with the numbers of a golden case, and its prototypes."""
    params = case.params
    method = SwAV(
        Rows(params.get("in", params["D"])),
        dim=params["D"],
        num_prototypes=params["K"],
        num_views=params["views"],
        temperature=params["temperature"],
        sinkhorn_temperature=params["epsilon"],
        sinkhorn_iterations=params["sinkhorn_iterations"],
        queue_size=params["queue"],
        queue_epochs=0,
        **options,
    )
    method.projector = projector
    method.to(case.dtype).prototypes.weight.data = case.inputs["prototypes0"]
    return method


def batch_of(views: Tensor) -> Batch:
    count = views.shape[1]
    return Batch([*views], torch.arange(count), torch.zeros(count, dtype=torch.long))


@golden_cases("swav_a")
def test_loss_and_gradients_equal_lightly_and_solo_learn(case: Case) -> None:
    high, low = (case.inputs[name].requires_grad_() for name in ("scores_high", "scores_low"))
    loss = swapped_prediction(torch.cat([high, low]), case.outputs["q"], temperature=case.params["temperature"])
    loss.backward()
    case.check(loss, "loss")
    case.check(high.grad, "grad_scores_high")
    case.check(low.grad, "grad_scores_low")


@golden_cases("swav_queue")
def test_loss_with_a_queue_equals_lightly_and_solo_learn(case: Case) -> None:
    scores = case.inputs["scores_high"].requires_grad_()
    loss = swapped_prediction(scores, case.outputs["q"], temperature=case.params["temperature"])
    loss.backward()
    case.check(loss, "loss")
    case.check(scores.grad, "grad_scores_high")


@golden_cases("swav_multicrop")
def test_steps_with_multi_crop_and_queue_equal_the_official_code(case: Case) -> None:
    method = official(case, nn.Identity())
    found: dict[str, list[Tensor]] = {name: [] for name in ("loss", "codes", "grad_z", "grad_prototypes", "queue")}
    computed = method.codes
    method.codes = lambda *rows: found["codes"].append(computed(*rows)) or found["codes"][-1]  # type: ignore
    for z in case.inputs["z"].requires_grad_():
        method.before_step(0.0, 0.0)
        loss = method(batch_of(z))["loss"]
        gradients = torch.autograd.grad(loss, [z, method.prototypes.weight], retain_graph=True)
        method.after_step(0.0)
        for name, value in (("loss", loss), ("grad_z", gradients[0]), ("grad_prototypes", gradients[1])):
            found[name].append(value.detach())
        found["queue"].append(method.queue.clone())
    case.check(method.prototypes.weight, "prototypes")
    found["codes"] = [torch.stack(pair) for pair in zip(found["codes"][::2], found["codes"][1::2], strict=True)]
    for name in found.keys() & case.outputs.keys():
        case.check(found[name], name)


@golden_cases("swav_steps")
def test_order_of_normalization_queue_freezing_and_update_equals_the_official_code(case: Case) -> None:
    params, x = case.params, case.inputs
    projector = nn.Linear(params["in"], params["D"])
    projector.weight.data, projector.bias.data = x["proj.weight0"], x["proj.bias0"]
    method = official(case, projector, freeze_prototypes_epochs=1)
    groups = parameter_groups(method, weight_decay=params["weight_decay"], decay_norm_and_bias=True)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=params["momentum"], weight_decay=params["weight_decay"])
    found: dict[str, list[Tensor]] = {"loss": [], "proj.weight": [], "proj.bias": [], "prototypes": []}
    for step, views in enumerate(x["x"]):
        for group in optimizer.param_groups:
            group["lr"] = params["lr"][step]
            group["is_frozen"] = "frozen_epochs" in group and step < params["freeze_prototypes_niters"]
        method.before_step(0.0, 0.0)
        optimizer.zero_grad()
        loss = method(batch_of(views))["loss"]
        loss.backward()
        drop_frozen_gradients(optimizer)
        optimizer.step()
        method.after_step(0.0)
        values = (loss, projector.weight, projector.bias, method.prototypes.weight)
        for name, value in zip(found, values, strict=True):
            found[name].append(value.detach().clone())
    for name, values_of_steps in found.items():
        case.check(values_of_steps, name)


def tiny_swav(**changes: Any) -> SwAV:
    torch.manual_seed(0)
    return SwAV(TinyNet(), **({"dim": 4, "hidden": 16, "num_prototypes": 12, "num_views": 3} | changes))


def test_equal_scores_give_the_logarithm_of_the_number_of_prototypes() -> None:
    codes = tiny_swav().codes(torch.zeros(6, 3000), torch.zeros(0, 4))
    torch.testing.assert_close(codes, torch.full((6, 3000), 1 / 3000))
    loss = swapped_prediction(torch.zeros(4, 6, 3000), torch.stack([codes, codes]), temperature=0.1)
    assert float(loss) == pytest.approx(math.log(3000))


def test_small_views_get_predictions_but_no_codes() -> None:
    method, batch = tiny_swav(), make_batch(views=3)
    batch.views[2] = batch.views[2][:, :, ::2, ::2]
    counted: list[tuple[int, ...]] = []
    computed = method.codes
    method.codes = lambda scores, queue: counted.append(tuple(scores.shape)) or computed(scores, queue)  # type: ignore
    method(batch)["loss"].backward()
    assert counted == [(8, 12)] * 2
    assert [tuple(rows.shape) for rows in method.embeddings] == [(8, 4)] * 2


def test_prototypes_have_length_one_in_every_forward_and_their_options() -> None:
    method = tiny_swav(freeze_prototypes_epochs=2)
    assert method.group_options() == {"prototypes": {"frozen_epochs": 2}}
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    method.before_step(0.5, 4.0)
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(12))


def test_the_queue_is_filled_from_its_epoch_on_and_used_when_full() -> None:
    method, batch = tiny_swav(num_views=2, queue_size=12, queue_epochs=2), make_batch(views=2)
    seen = []
    for epoch in (1.5, 2.0, 2.5, 3.0):
        method.before_step(0.0, epoch)
        method(batch)
        method.after_step(0.0)
        seen.append((method.fills_queue, method.uses_queue, method.queued))
    assert seen == [(False, False, 0), (True, False, 8), (True, False, 12), (True, True, 12)]
    torch.testing.assert_close(method.queue[:, :8], torch.stack(method.embeddings))
    other = tiny_swav(num_views=2, queue_size=12, queue_epochs=2)
    other.load_state_dict(method.state_dict())
    assert other.queued == 12


def steps_of(dtype: torch.dtype, queue_size: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    net = TinyNet(norm=False)
    method = SwAV(net, dim=4, hidden=16, num_prototypes=6, num_views=2, queue_size=queue_size, queue_epochs=0)
    method.to(dtype)
    losses, total = [], {}
    for step in range(4):
        method.before_step(step / 4, step)
        loss = method(mine(make_batch(8, views=2, seed=step, dtype=dtype)))["loss"]
        gradients = torch.autograd.grad(loss, [*method.parameters()])
        names = [name for name, _ in method.named_parameters()]
        total = {n: total.get(n, 0) + g for n, g in zip(names, gradients, strict=True)}
        losses.append(loss.detach())
        method.after_step(step / 4)
    return losses, total | {"queue": method.queue}


@pytest.mark.parametrize("queue_size", [0, 8, 12])
def test_two_processes_are_one(queue_size: int, pair: Pair) -> None:
    losses, total = steps_of(torch.float64, queue_size)
    first, second = pair.run(steps_of, torch.float64, queue_size)
    mean = torch.stack([torch.stack(part[0]) for part in (first, second)]).mean(0)
    torch.testing.assert_close(mean, torch.stack(losses), rtol=1e-10, atol=1e-10)
    for name, value in total.items():
        torch.testing.assert_close((first[1][name] + second[1][name]) / 2, value, rtol=1e-7, atol=1e-9)
    assert torch.equal(first[1]["queue"], second[1]["queue"])


SHAPES = [
    "method=swav",
    "method.dim=32",
    "method.hidden=64",
    "method.num_prototypes=50",
    "method.num_views=2",
    "views=simclr_cifar",
    "backbone.width=16",
    "dataset.image_size=16",
    "dataset.limit=512",
    "train.batch_size=128",
    "train.max_steps=200",
    "train.save_every_epochs=0",
    "monitor.on_collapse=stop",
]


def test_on_shapes_the_loss_falls_while_prototypes_stay_in_use_and_the_guard_is_silent(tmp_path: Path) -> None:
    """With large crops of as many images as a batch has, 100 of the 200 steps are enough."""
    easy = ["views=cifar_symmetric_weak", "views.views.0.crop_scale=[0.8,1]", "dataset.limit=128"]
    fast = ["optimizer=adamw", "optimizer.lr=0.02", "method.freeze_prototypes_epochs=0", "train.max_steps=100"]
    run = make_run(tmp_path, *SHAPES, *easy, *fast, "method.sinkhorn_temperature=0.02")
    assigned: list[Tensor] = []
    computed = run.method.codes  # type: ignore[operator]
    run.method.codes = lambda *rows: assigned.append(computed(*rows)) or assigned[-1]  # type: ignore
    finish(run)
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["train/loss"] for line in lines if "train/loss" in line][-1] < math.log(50) - 1
    assert len(torch.cat(assigned[-8:]).argmax(1).unique()) > 25
    measured = [line for line in lines if "health/std" in line]
    assert min(line["health/std"] for line in measured) > 0.7 / 32**0.5
    assert measured[-1]["health/assignment_information"] > 1.5


def test_the_collapse_with_uniform_codes_is_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path, *SHAPES, "optimizer.lr=0.2", "method.sinkhorn_temperature=0.1")
    with pytest.raises(TrainingFailed, match=r"collapsed at step (100|150|200)"):
        finish(run)
    losses = [line["train/loss"] for line in read(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert losses[-1] == pytest.approx(math.log(50), abs=0.01)
    found = [line["health/assignment_information"] for line in read(tmp_path / "metrics.jsonl") if "health/std" in line]
    assert found[0] > 0.5
    assert found[-1] < 0.003


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_views": 1}, "num_views is 1"),
        ({"queue_size": -1}, "queue_size is -1"),
        ({"temperature": 0.0}, "temperature"),
        ({"num_prototypes": 0}, "num_prototypes"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_swav(**changes)
