"""Requirements that every method of conf/method/*.yaml meets."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from method_runs import METHODS, config_of, iterate_batches
from small_runs import differences, newest
from sslcli.config.run_config import RunConfig
from sslcli.methods.base import Batch, Method
from sslcli.runs import worker
from sslcli.runs.build import build_optimizer
from sslcli.runs.parts import build_parts


@dataclass
class Trace:
    """Outcome of a training."""

    method: Method
    scalars: list[dict[str, Tensor]]  # by step
    gradients: list[dict[str, Tensor | None]]  # by step
    state: dict[str, Any]


def take_steps(config: RunConfig, batches: list[Batch]) -> Trace:
    """Train at a constant rate, as the loop does."""
    method = build_parts(config).method.train()
    optimizer, _ = build_optimizer(config, method)
    scalars, gradients = [], []
    for step, batch in enumerate(batches):
        method.before_step(step / len(batches), step / 4)
        found = method(batch)
        found["loss"].backward()
        scalars.append({name: value.detach() for name, value in found.items()})
        gradients.append({n: copy.deepcopy(p.grad) for n, p in method.named_parameters() if p.requires_grad})
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step / len(batches))
    return Trace(method, scalars, gradients, copy.deepcopy(method.state_dict()))


def test_there_are_methods() -> None:
    assert {"moco", "moco_v2", "moco_v3", "simclr", "byol"} <= set(METHODS)


@pytest.mark.parametrize("word", METHODS)
def test_a_step_has_a_finite_loss_and_a_gradient_for_every_trainable_parameter(word: str) -> None:
    config = config_of(word)
    batches = iterate_batches(word)
    trace = take_steps(config, [*batches, batches[0]])  # an empty memory bank fills in the first epoch
    assert all(value.isfinite() and value.ndim == 0 for value in trace.scalars[-1].values())
    assert trace.gradients[-1]
    without = [n for n, g in trace.gradients[-1].items() if g is None or not g.isfinite().all() or not g.any()]
    assert without == []


@pytest.mark.parametrize("word", METHODS)
def test_a_loaded_state_computes_what_the_saved_one_would(word: str) -> None:
    config = config_of(word)
    *batches, last = iterate_batches(word)
    trace = take_steps(config, batches)
    twin = build_parts(config.changed(seed=1)).method.train()
    assert differences(twin.state_dict(), trace.state) != []
    twin.load_state_dict(trace.state)
    assert differences(twin.state_dict(), trace.state) == []
    losses = []
    for method in (trace.method, twin):
        torch.manual_seed(0)
        for batch in (last, batches[0]):
            losses.append(method(batch)["loss"])
            method.after_step(0.5)
    assert torch.equal(torch.stack(losses[:2]), torch.stack(losses[2:]))
    assert differences(twin.state_dict(), trace.method.state_dict()) == []


@pytest.fixture
def _determinism_as_before() -> Iterator[None]:
    before = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.mark.parametrize("word", METHODS)
@pytest.mark.usefixtures("_determinism_as_before")
def test_ten_steps_are_five_and_five_more_after_loading_bit_for_bit(word: str, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert worker.run(config_of(word).changed(run_dir=str(whole))) == 0
    (half / "checkpoints").mkdir(parents=True)
    for path in (whole / "checkpoints").glob("step-00000005.*"):
        shutil.copy(path, half / "checkpoints")
    assert newest(half)["step"] == 5
    assert worker.run(config_of(word).changed(run_dir=str(half), resume="must")) == 0
    assert newest(half)["step"] == newest(whole)["step"] == 10
    assert differences(newest(half), newest(whole)) == []


@pytest.mark.parametrize("word", METHODS)
def test_the_loss_falls_on_a_small_fixed_set(word: str) -> None:
    config = config_of(word)
    config = config.changed(train=config.values["train"] | {"lr_scaling": "none"})
    batches = iterate_batches(word)
    for num_epochs in (10, 60):  # a choice among hundreds of candidates is learned slowly at first
        trace = take_steps(config, batches * num_epochs)
        losses = torch.stack([scalars[trace.method.decreasing_metric] for scalars in trace.scalars])
        epochs = losses.view(num_epochs, 4).mean(1)
        before, after = epochs[1], epochs[-1]  # the first epoch fills what queues and running statistics start without
        if after < before - 0.05 * before.abs():
            return
    raise AssertionError(f"the loss did not fall by 5 %: {epochs}")
