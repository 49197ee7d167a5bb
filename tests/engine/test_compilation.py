"""When the steps of a run are compiled, and what is compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters

from default_settings import TRAIN
from method_runs import METHODS, config_of, iterate_batches
from processes import Pair
from sslcli.backbones.small import Small
from sslcli.engine.compilation import MIN_STEPS, compile_method, why_not
from sslcli.engine.loop import parallel
from sslcli.errors import ConfigError
from sslcli.methods.base import Method
from sslcli.methods.mixture import UnMix
from sslcli.methods.moco import MoCo
from sslcli.methods.simclr import SimCLR
from sslcli.runs.parts import build_parts
from tiny import TinyNet, copied_state, make_batch, mine

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Simulate a machine with a new GPU, Triton, compilers and the C header of Python."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
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
        ("sysconfig.get_path", "/no-such-folder", "does not find /no-such-folder/Python.h (package python3-dev"),
    ],
)
def test_what_a_machine_lacks_is_a_reason_or_an_error(
    name: str, answer: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, lambda given: answer)
    assert reason in str(why_not(TRAIN, GPU, MIN_STEPS))
    with pytest.raises(ConfigError, match=r"^train.compile is true, but torch.compile .* or set train.compile=false"):
        why_not(replace(TRAIN, compile=True), GPU, MIN_STEPS)


@pytest.mark.parametrize(
    ("compiler", "named"), [("no-such-compiler -O2", "no-such-compiler -O2"), ("", "variable CXX is empty")]
)
def test_compilation_on_the_cpu_needs_a_compiler(compiler: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ConfigError, match=rf"no C\+\+ compiler \(.*{named}\)"):
        why_not(replace(TRAIN, compile=True), CPU, 1)


@pytest.mark.usefixtures("capable")
def test_compilation_on_the_cpu_needs_the_header_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/no-such-folder")
    with pytest.raises(ConfigError, match=r"does not find /no-such-folder/Python\.h"):
        why_not(replace(TRAIN, compile=True), CPU, 1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_compiled_code_is_as_deterministic_as_other_code(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda mode, warn_only: calls.append((mode, warn_only)))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: calls.append(module))
    method = SimCLR(Small(width=2, image_size=16))
    with warnings.catch_warnings():
        compile_method(method, cached_gradients=False)
        compile_method(method, cached_gradients=True)
    assert calls == [(deterministic, True), method, (deterministic, True), method.backbone]


@pytest.fixture
def fresh() -> Iterator[None]:
    """torch.compile without code that other tests have compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# Methods of which only the backbone is compiled: with a gradient penalty, or with other shapes in every step
ONLY_BACKBONE = {"deep_infomax", "ijepa"}
# One graph as well, which takes seconds to verify. dinov2 and lejepa are tested: they have each kind of random numbers.
NOT_TESTED = {
    *("autoencoder", "bigan", "cmc", "cpc", "cpc_v2", "dcgan", "ibot", "infomin", "mae", "memory_bank", "simmim"),
    "vae",
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("word", [word for word in METHODS if word not in ONLY_BACKBONE | NOT_TESTED])
def test_the_step_of_a_method_is_one_graph_and_is_compiled_once(word: str) -> None:
    method, batches = build_parts(config_of(word)).method.train(), iterate_batches(word)
    graphs = CompileCounter()
    compile_method(method, cached_gradients=False, backend=graphs)
    for step in range(12):
        method(batches[step % len(batches)])["loss"].backward()
        method.after_step(step / 12)
        method.zero_grad()
    with torch.no_grad():  # features of a last, partial batch
        method.eval().features(batches[0].views[0][:3])
    assert graphs.frame_count == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh")
def test_a_loss_with_a_gradient_penalty_is_not_compiled() -> None:
    method = build_parts(config_of("deep_infomax")).method.train()
    compile_method(method, cached_gradients=False, backend=CompileCounterWithBackend("aot_eager"))
    method(iterate_batches("deep_infomax")[0])["loss"].backward()
    assert method.differentiates_twice


def gradients(word: str, compiled: bool) -> list[dict[str, Tensor]]:
    """Loss, gradients and state of three steps of a method."""
    torch.manual_seed(0)
    method, found = build_parts(config_of(word)).method.train(), []
    if compiled:
        compile_method(method, cached_gradients=False, backend="aot_eager")
    for step, batch in enumerate(iterate_batches(word)[:3]):
        loss = method(batch)["loss"]
        loss.backward()
        found.append({name: part.grad for name, part in method.named_parameters() if part.grad is not None})
        found[-1] |= {"loss": loss.detach(), "draws": torch.tensor(method.noise.draws)}
        method.zero_grad()
        method.after_step(step / 3)
    return found


@pytest.mark.usefixtures("fresh")
def test_random_numbers_are_not_drawn_again_in_the_backward_pass_of_compiled_code() -> None:
    expected, found = (gradients("vae", compiled) for compiled in (False, True))
    torch.testing.assert_close(found, expected)
    assert [int(step["draws"]) for step in found] == [1, 2, 3]


@pytest.mark.usefixtures("fresh")
def test_of_a_method_that_mixes_images_only_the_backbone_is_compiled() -> None:
    method = SimCLR(TinyNet(), mixture=UnMix())
    graphs = CompileCounterWithBackend("eager")
    compile_method(method, cached_gradients=False, backend=graphs)
    for step in range(3):
        method(make_batch(16, seed=step))["loss"].backward()
    assert graphs.frame_count == 1


def small_method(word: str) -> Method:
    torch.manual_seed(0)
    return SimCLR(TinyNet()) if word == "simclr" else MoCo(TinyNet(), queue_size=32, bn_group=4)


def steps(method: Method, compiled: bool) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Losses of three steps on this process, the state after them, and the number of graphs."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    if compiled:
        compile_method(method, cached_gradients=False, backend=graphs)
    model = parallel(method, CPU)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        loss = model(mine(make_batch(16, seed=step)))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step / 3)
        losses.append(loss.detach())
    return losses, copied_state(method), graphs.frame_count


@pytest.mark.parametrize("word", ["simclr", "moco"])
def test_compiled_steps_of_two_processes_are_those_of_uncompiled_code(word: str, pair: Pair) -> None:
    compiled, plain = (pair.run(steps, small_method(word), flag) for flag in (True, False))
    for (losses, state, graphs), (expected_losses, expected_state, _) in zip(compiled, plain, strict=True):
        assert graphs == 1
        torch.testing.assert_close(losses, expected_losses)
        torch.testing.assert_close(state, expected_state)
