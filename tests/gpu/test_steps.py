"""A training step of every method on the device equals the step of the CPU."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from method_runs import CPU, FAMILIES, METHODS, config_of, iterate_batches
from sslcli.engine import precision
from sslcli.runs import worker
from sslcli.runs.assemble import move_to_device
from sslcli.runs.build import build_optimizer
from sslcli.runs.parts import build_parts

pytestmark = pytest.mark.gpu


class Step(NamedTuple):
    """Results of one training step on the CPU: loss, gradients and the state that `after_step` changed, by name."""

    loss: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


@cache
def trained_state(word: str) -> dict[str, Tensor]:
    """Return the state of a method after one epoch on the CPU, in which queues and memory banks were filled."""
    config = config_of(word)
    method = build_parts(config).method.train()
    optimizer, _ = build_optimizer(config, method)
    for batch in iterate_batches(word):
        method(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.0)
    return method.state_dict()


def step_of(word: str, device: torch.device, dtype_name: str) -> Step:
    """Return the results of the step after the first epoch, on `device`, without an optimizer."""
    config = config_of(word)
    method = build_parts(config).method.train()
    method.load_state_dict(copy.deepcopy(trained_state(word)))
    move_to_device(method, config.train, device)
    with precision.autocast(device, dtype_name):
        loss = method(iterate_batches(word)[0].to(device))["loss"]
    loss.backward()
    method.after_step(0.5)
    trainable = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    state = {name: value.detach().cpu() for name, value in method.state_dict().items() if name not in trainable}
    gradients = {name: value.grad.cpu() for name, value in trainable.items() if value.grad is not None}
    return Step(loss.detach().cpu(), gradients, state)


@cache
def step_of_cpu(word: str, dtype_name: str, *, one_dnn: bool = True) -> Step:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=one_dnn):
            return step_of(word, CPU, dtype_name)


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative L2 distance of a tensor; 1 % of the norm of all tensors is added to its norm."""
    assert found.keys() == expected.keys()
    norms = {name: value.double().norm() for name, value in expected.items()}
    added = 0.01 * float(torch.tensor([*norms.values(), 0.0]).norm())
    apart = (
        (found[name].double() - value.double()).norm() / (norms[name] + added + 1e-12)
        for name, value in expected.items()
    )
    return max(map(float, apart), default=0.0)


@pytest.fixture
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable TF32, which torch uses for convolutions on GPUs by default: it keeps only 10 bits of each factor."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("word", METHODS)
@pytest.mark.parametrize("dtype_name", ["bf16", "fp32"])
@pytest.mark.usefixtures("_full_float32")
def test_a_step_equals_the_step_of_the_cpu(dtype_name: str, word: str, device: torch.device) -> None:
    """The reference is a float32 step on the CPU, and the tolerance is the effect of other rounding on the CPU.

    In bf16, the device may deviate twice as much as the CPU in bf16. In fp32, it may deviate by 1e-4, or five times as
    much as the CPU without oneDNN: gradients of adversarial losses amplify rounding.
    """
    expected, found = step_of_cpu(word, "fp32"), step_of(word, device, dtype_name)
    if dtype_name == "bf16":
        rounded, factor, least = step_of_cpu(word, "bf16"), 2.0, 1e-2
    else:
        rounded, factor, least = step_of_cpu(word, "fp32", one_dnn=False), 5.0, 1e-4
    for part in ("gradients", "state"):
        tolerance = max(least, factor * distance(getattr(rounded, part), getattr(expected, part)))
        assert distance(getattr(found, part), getattr(expected, part)) <= tolerance, part
    scale = least * max(1.0, float(expected.loss.abs()))
    assert abs(found.loss - expected.loss) <= max(scale, factor * float(abs(rounded.loss - expected.loss)))


@pytest.mark.parametrize("word", METHODS)
def test_a_step_does_not_wait_for_the_gpu(word: str, device: torch.device) -> None:
    """On a GPU, torch raises an error at the first operation that waits."""
    config = config_of(word)
    method = build_parts(config).method.train()
    move_to_device(method, config.train, device)
    optimizer, _ = build_optimizer(config, method)
    batches = [batch.to(device) for batch in iterate_batches(word)]
    before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    for number, batch in enumerate(batches):  # the first steps create the state of the optimizer and of the memory bank
        if device.type == "cuda" and number > 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            method(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(0.5)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert any(not torch.equal(before[name], parameter) for name, parameter in method.named_parameters())


def losses(word: str, run_dir: Path, device: torch.device, **settings: object) -> list[float]:
    """Train for four steps with `settings` of train.yaml, and return the loss of each step."""
    config = config_of(word)
    train = config.values["train"] | {"max_steps": 4} | settings
    assert worker.run(config.changed(device=str(device), train=train, run_dir=str(run_dir))) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("word", FAMILIES)
def test_fp16_trains_as_fp32(word: str, device: torch.device, tmp_path: Path) -> None:
    """The first loss is the same within 2 %; later ones differ, because loss scaling skips the first steps."""
    expected = losses(word, tmp_path / "fp32", device, precision="fp32")
    found = losses(word, tmp_path / "fp16", device, precision="fp16")
    assert len(found) == 4
    assert torch.tensor(found).isfinite().all()
    assert found[0] == pytest.approx(expected[0], rel=0.02, abs=0.02)


@pytest.mark.gpu(in_make_test=False)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("word", FAMILIES)
def test_compiled_steps_equal_eager_steps(word: str, device: torch.device, tmp_path: Path) -> None:
    expected = losses(word, tmp_path / "eager", device, precision="fp32", compile=False)
    found = losses(word, tmp_path / "compiled", device, precision="fp32", compile=True)
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-3)
