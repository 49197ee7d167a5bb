"""When the steps of a run are compiled. The compilation itself is tested with the methods."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from default_settings import TRAIN
from sslcli.backbones.small import Small
from sslcli.engine.compilation import MIN_STEPS, compile_method, why_not
from sslcli.errors import ConfigError
from sslcli.methods.simclr import SimCLR

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with a new GPU, Triton and compilers."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "old GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name or None)


@pytest.mark.usefixtures("capable")
@pytest.mark.parametrize(
    ("values", "device", "steps", "reason"),
    [
        ({"compile": "auto"}, GPU, MIN_STEPS, None),
        ({"compile": "auto"}, GPU, MIN_STEPS - 1, "fewer than 10,000 steps"),
        ({"compile": "auto"}, CPU, MIN_STEPS, "does not compile on cpu"),
        ({"compile": "auto"}, torch.device("mps"), MIN_STEPS, "does not compile on mps"),
        ({"compile": "auto", "sharding": "fsdp"}, GPU, MIN_STEPS, "train.sharding"),
        ({"compile": "auto", "activation_checkpointing": True}, GPU, MIN_STEPS, "activation_checkpointing"),
        ({"compile": False}, GPU, MIN_STEPS, "train.compile=false"),
        ({"compile": True}, GPU, 1, None),
        ({"compile": True}, CPU, 1, None),
    ],
)
def test_long_runs_on_a_gpu_are_compiled(
    values: dict[str, Any], device: torch.device, steps: int, reason: str | None
) -> None:
    found = why_not(replace(TRAIN, **values), device, steps)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.usefixtures("capable")
@pytest.mark.parametrize(
    ("name", "answer", "reason"),
    [
        ("torch.cuda.get_device_capability", (6, 1), "supports no GPU of this age (old GPU)"),
        ("importlib.util.find_spec", None, "does not find the package triton"),
        ("shutil.which", None, "finds no C compiler"),
    ],
)
def test_what_a_machine_lacks_is_a_reason_or_an_error(
    name: str, answer: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, lambda given: answer)
    assert reason in str(why_not(TRAIN, GPU, MIN_STEPS))
    with pytest.raises(ConfigError, match=r"^train.compile is true, but torch.compile .* or set train.compile=false"):
        why_not(replace(TRAIN, compile=True), GPU, MIN_STEPS)


def test_compilation_on_the_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        why_not(replace(TRAIN, compile=True), CPU, 1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_compiled_code_is_as_deterministic_as_other_code(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda mode, warn_only: calls.append((mode, warn_only)))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: calls.append(module))
    method = SimCLR(Small(width=2, image_size=16))
    with warnings.catch_warnings():
        compile_method(method)
    assert calls == [(deterministic, True), method.backbone]
