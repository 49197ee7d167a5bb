"""The learning rate and the number of steps of a run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from one_run import finish, make_run
from small_runs import differences, newest
from sslcli.engine import checkpoint
from sslcli.engine.run import Run
from sslcli.methods.base import GroupOptions
from sslcli.methods.byol import BYOL
from sslcli.report.metrics import read
from tiny import equal_states


def test_the_learning_rate_of_each_step_is_that_of_the_schedule(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, "train.max_steps=8", "train.log_every_steps=1", "train.warmup_epochs=0.67", "optimizer.lr=0.8"
    )
    finish(run)
    rates = [line["train/lr"] for line in read(tmp_path / "metrics.jsonl") if "train/lr" in line]
    assert run.warmup_steps == 2
    assert rates[:3] == pytest.approx([0.0, 0.05, 0.1])
    assert rates == pytest.approx([run.lr_at(step) for step in range(8)])
    assert rates[-1] < rates[3] < rates[2]


@pytest.mark.parametrize(
    ("overrides", "total", "warmup"),
    [
        (["train.epochs=2"], 6, 1),
        (["train.epochs=2", "train.max_steps=40", "train.warmup_epochs=2"], 40, 6),
        (["train.max_steps=8", "train.warmup_epochs=2"], 8, 2),  # at most a quarter of the run
    ],
)
def test_epochs_are_counted_in_steps(tmp_path: Path, overrides: list[str], total: int, warmup: int) -> None:
    run = make_run(tmp_path, *overrides)
    run.stop.close()
    run.monitor.close()
    assert (run.total_steps, run.warmup_steps) == (total, warmup)


def scheduled_run(run_dir: Path, *overrides: str) -> Run:
    """A run of 3 steps per epoch. The group of projector.0 is frozen during one epoch."""
    lines = ["method=byol", "method.hidden=16", "method.dim=8", "dataset.image_size=16", "train.warmup_epochs=0.67"]
    lines += ["optimizer=adamw", "optimizer.weight_decay=0.04", "train.final_weight_decay=0.4"]
    return make_run(run_dir, *lines, "train.max_steps=12", "train.save_every_steps=2", *overrides)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Give parts of BYOL schedules of their own. The arguments of `before_step` are added to the list."""
    calls: list[tuple[float, float]] = []
    options: dict[str, GroupOptions] = {
        "predictor": {"constant_lr": True, "wd_scale": 0.5},
        "projector.0": {"frozen_epochs": 1},
    }
    monkeypatch.setattr(BYOL, "group_options", lambda self: options)
    monkeypatch.setattr(BYOL, "before_step", lambda self, progress, epoch: calls.append((progress, epoch)))
    return calls


def test_groups_have_the_schedules_that_the_method_asks_for(tmp_path: Path, seen: list[tuple[float, float]]) -> None:
    run = scheduled_run(tmp_path, "train.schedule_length=1.25")
    name_of = {parameter: name for name, parameter in run.method.named_parameters()}
    steps = []
    original = run.optimizer.step

    def step(*arguments: object, **options: object) -> object:
        groups = {name_of[group["params"][0]]: dict(group) for group in run.optimizer.param_groups}
        frozen = run.method.get_parameter("projector.0.weight")
        steps.append((groups, frozen.grad is None, frozen.detach().clone()))
        return original(*arguments, **options)  # type: ignore[arg-type]

    run.optimizer.step = step  # type: ignore[method-assign, assignment]
    finish(run)
    assert len(steps) == 12
    rates = [groups["backbone.block1.0.weight"]["lr"] for groups, *_ in steps]
    assert rates == [run.lr_at(step) for step in range(12)]
    assert rates[0] == 0
    assert {groups["predictor.0.weight"]["lr"] for groups, *_ in steps} == {run.peak_lr}
    decays = [groups["backbone.block1.0.weight"]["weight_decay"] for groups, *_ in steps]
    assert decays[0] == pytest.approx(0.04)
    assert decays == [run.weight_decay_at(step) for step in range(12)]
    assert decays[-1] == pytest.approx(0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * 11 / 15)))
    assert [groups["predictor.0.weight"]["weight_decay"] for groups, *_ in steps] == [d / 2 for d in decays]
    assert {groups["predictor.0.bias"]["weight_decay"] for groups, *_ in steps} == {0.0}
    assert [frozen for _, frozen, _ in steps] == [True] * 3 + [False] * 9
    weights = [weight for *_, weight in steps]
    assert all(torch.equal(weight, weights[0]) for weight in weights[:4])
    assert not torch.equal(weights[4], weights[3])
    assert seen == [(pytest.approx(step / 15), pytest.approx(step / 3)) for step in range(12)]


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize("first", [2, 6])  # while the group is frozen, and afterwards
def test_a_run_with_schedules_resumes_bit_for_bit(tmp_path: Path, first: int) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    finish(scheduled_run(whole, "train.keep=9"))
    (half / "checkpoints").mkdir(parents=True)
    for path in (whole / "checkpoints").glob(f"step-{first:08d}.*"):
        shutil.copy(path, half / "checkpoints")
    assert newest(half)["step"] == first
    finish(scheduled_run(half, "train.keep=9"))
    assert differences(newest(half), newest(whole)) == []


def test_a_short_run_is_frozen_for_a_quarter_of_its_length(tmp_path: Path) -> None:
    run = make_run(tmp_path, "train.max_steps=8")
    run.stop.close()
    run.monitor.close()
    assert [run.frozen_steps_of(epochs) for epochs in (10, 0.34, 0)] == [2, 1, 0]


FROZEN = ["train.max_steps=8", "train.freeze_backbone_epochs=0.67", "train.save_every_steps=1", "train.keep=9"]


def backbone_state(run_dir: Path, step: int, part: str = "backbone") -> dict[str, torch.Tensor]:
    state = checkpoint.load(run_dir / f"checkpoints/step-{step:08d}.pt", device=torch.device("cpu"))["method"]
    return {name: value for name, value in state.items() if name.startswith(f"{part}.")}


@pytest.mark.parametrize(
    "line",
    [
        ["method=moco", "method.queue_size=64", "method.bn_group=8"],
        ["method=dino", "optimizer=lars", "method.hidden=32", "method.num_prototypes=64", "dataset.image_size=16"],
        ["optimizer=adamw", "optimizer.weight_decay=0.5", "train.accumulate=4", "train.cached_gradients=true"],
    ],
    ids=lambda line: line[0],
)
def test_a_frozen_backbone_keeps_weights_and_statistics_and_resumes_bit_for_bit(
    line: list[str], tmp_path: Path
) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    run = make_run(whole, *line, *FROZEN)
    start = {f"backbone.{name}": value.clone() for name, value in run.method.backbone.state_dict().items()}
    head = next(name for name, _ in run.method.named_parameters() if not name.startswith("backbone."))
    before = run.method.get_parameter(head).detach().clone()
    finish(run)
    assert run.frozen_steps == 2
    assert any("running_mean" in name for name in start)
    assert equal_states(backbone_state(whole, 2), start)
    part = run.method.evaluated_part
    assert equal_states(
        {name.removeprefix(part): value for name, value in backbone_state(whole, 2, part).items()},
        {name.removeprefix("backbone"): value for name, value in start.items()},
    )
    later = backbone_state(whole, 4)
    assert not any(torch.equal(later[name], value) for name, value in start.items() if value.ndim > 1)
    assert not any(torch.equal(later[name], start[name]) for name in start if "running_mean" in name)
    assert not torch.equal(run.method.get_parameter(head), before)
    (half / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints/step-00000001.pt", half / "checkpoints")
    finish(make_run(half, *line, *FROZEN))
    assert differences(newest(half), newest(whole)) == []


def test_a_group_with_a_weight_decay_of_its_own_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def groups(method: BYOL) -> list[dict[str, Any]]:
        own = {"params": list(method.predictor.parameters()), "weight_decay": 0.3}
        return [own, {"params": list(method.projector.parameters())}]

    monkeypatch.setattr(BYOL, "param_groups", groups)
    run = scheduled_run(tmp_path)
    run.begin_step(11)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.3, run.weight_decay_at(11)]
    run.stop.close()
    run.monitor.close()
