"""Gradient clipping by the norm of the whole gradient, of tensors and of modules."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from one_run import make_run
from sslcli.engine.clipping import clip_each, clip_gradients
from sslcli.engine.loop import optimize
from sslcli.engine.optim import drop_frozen_gradients


@golden_cases("dino_clip")
def test_each_tensor_is_clipped_as_in_dino_before_the_last_layer_is_frozen(case: Case) -> None:
    names = [name.removeprefix("grad.") for name in case.inputs]
    weights = {name: nn.Parameter(torch.zeros_like(case.inputs[f"grad.{name}"])) for name in names}
    for name, weight in weights.items():
        weight.grad = case.inputs[f"grad.{name}"]
    clip_each([weight.grad for weight in weights.values() if weight.grad is not None], case.params["clip"])
    optimizer = torch.optim.SGD([{"params": [w], "is_frozen": "last_layer" in name} for name, w in weights.items()])
    drop_frozen_gradients(optimizer)
    for name, weight in weights.items():
        case.check(torch.zeros_like(weight) if weight.grad is None else weight.grad, f"clipped.{name}")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.scale = nn.Parameter(torch.zeros(4))
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("by", "parts"),
    [
        ("all", [["token", "scale", "backbone", "head"]]),
        ("module", [["token", "scale"], ["backbone"], ["head"]]),
        ("tensor", None),
    ],
)
def test_the_norm_of_each_part_is_limited(by: str, parts: list[list[str]] | None) -> None:
    torch.manual_seed(0)
    net = Net()
    for number, (name, parameter) in enumerate(net.named_parameters()):
        if not name.startswith("unused"):
            parameter.grad = torch.randn_like(parameter) * (0.01 if name == "head.bias" else 1 + number)
    before = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    groups = [[n] for n in before] if parts is None else [[n for n in before if n.split(".")[0] in p] for p in parts]
    clip_gradients(net, 0.7, by=by)
    small = 0
    for names in groups:
        old = torch.cat([before[name].flatten() for name in names])
        new = torch.cat([gradient(net, name).flatten() for name in names])
        small += int(old.norm() < 0.7)
        torch.testing.assert_close(new, old * min(1.0, 0.7 / float(old.norm() + 1e-6)))
    assert small == (by == "tensor")  # only head.bias alone is within the limit


def gradient(net: nn.Module, name: str) -> Tensor:
    found = net.get_parameter(name).grad
    assert found is not None
    return found


def test_nothing_to_clip_is_no_error() -> None:
    for by in ("all", "tensor", "module"):
        clip_gradients(Net(), 1.0, by=by)


@pytest.mark.parametrize("by", ["all", "tensor", "module"])
@pytest.mark.parametrize(("cached", "precision"), [("true", "fp32"), ("false", "fp32"), ("false", "fp16")])
def test_a_step_is_clipped_by_the_chosen_norm(tmp_path: Path, by: str, cached: str, precision: str) -> None:
    lines = ["method=simclr", "method.hidden=16", "train.max_steps=1", "train.accumulate=2"]
    lines += [
        f"train.precision={precision}",
        f"train.cached_gradients={cached}",
        "train.clip_grad=0.01",
        f"train.clip_grad_by={by}",
    ]
    run = make_run(tmp_path, *lines, "optimizer.momentum=0", "optimizer.weight_decay=0")
    if precision == "fp16":
        run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # the usual one overflows in the first step
    before = copy.deepcopy(run.method.state_dict())
    for group in run.optimizer.param_groups:
        group["lr"] = 1.0
    (batches,) = run.loader.steps(0, 1)
    optimize(run, run.method, batches)
    run.stop.close()
    run.monitor.close()
    moved = {name: (p.detach() - before[name]).flatten() for name, p in run.method.named_parameters()}
    parts = {"all": lambda name: "", "tensor": lambda name: name, "module": lambda name: name.split(".")[0]}[by]
    lengths = {part: torch.cat([m for n, m in moved.items() if parts(n) == part]).norm() for part in map(parts, moved)}
    assert max(lengths.values()) <= 0.01 + 1e-6
    assert sum(length > 0.0099 for length in lengths.values()) >= {"all": 1, "module": 2, "tensor": 5}[by]
