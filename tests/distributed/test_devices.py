"""Device of a process. Launchers are tested together with the processes they start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import nn

from default_settings import TRAIN
from sslcli.backbones.small import Small
from sslcli.distributed import devices, processes
from sslcli.errors import ConfigError
from sslcli.methods.simclr import SimCLR
from sslcli.runs.assemble import move_to_device


def has(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    monkeypatch.setattr(devices, "available", lambda: ["cpu", *kinds])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("mps", [True, False])
def test_kinds_of_devices_are_those_of_torch(cuda: bool, mps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert devices.available() == ["cpu"] + ["cuda"] * cuda + ["mps"] * mps


@pytest.mark.parametrize(("kinds", "expected"), [((), "cpu"), (("cuda",), "cuda:0"), (("mps",), "cpu")], ids=str)
def test_auto_is_what_was_tried(kinds: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, *kinds)
    assert str(devices.pick_device("auto")) == expected
    assert str(devices.pick_device("cpu")) == "cpu"


def test_each_process_of_a_node_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, "cuda", "mps")
    assert str(devices.pick_device("mps")) == "mps"
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (variables | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert str(devices.pick_device("auto")) == str(devices.pick_device("cuda")) == "cuda:1"
    with pytest.raises(ConfigError, match="device is 'mps', which does not support several processes"):
        devices.pick_device("mps")
    with pytest.raises(ConfigError, match="device is 'cuda:1', but each process of a run needs its own GPU"):
        devices.pick_device("cuda:1")


@pytest.mark.parametrize(
    ("name", "kinds", "message"),
    [
        ("cuda", (), "device is 'cuda', but this machine has only: cpu"),
        ("mps", ("cuda",), "device is 'mps', but this machine has only: cpu, cuda"),
        ("cuda:2", ("cuda",), "device is 'cuda:2', but this machine has 2 CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, kinds: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, *kinds)
    with pytest.raises(ConfigError, match=message):
        devices.pick_device(name)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Simulate one GPU for the choice and preparation of a device; return the devices that became current.

    torch's own check of the device runs; only the call into the driver is replaced.
    """
    has(monkeypatch, "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    current: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    yield current
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_gpu"), [("auto", True, False), (True, True, True), (False, False, False)]
)
def test_kernels_are_deterministic_by_default_only_on_the_cpu(
    setting: Literal["auto"] | bool, on_cpu: bool, on_gpu: bool
) -> None:
    assert devices.uses_deterministic_kernels(setting, torch.device("cpu")) is on_cpu
    for name in ("cuda:0", "mps"):
        assert devices.uses_deterministic_kernels(setting, torch.device(name)) is on_gpu


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_of_a_gpu_are_measured_unless_they_are_deterministic(
    one_gpu: list[int], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        devices.prepare(torch.device("cuda", 0), deterministic=deterministic)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_one_process_on_one_gpu_starts(name: str, one_gpu: list[int]) -> None:
    device = devices.pick_device(name)
    devices.prepare(device, deterministic=True)
    with processes.process_group(device, limit=60, end=lambda message: None):
        assert not torch.distributed.is_initialized()
    assert one_gpu == [0]
    assert device.index == 0


def test_processes_with_gpus_meet_over_nccl(one_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    joined = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in joined.items():
        monkeypatch.setenv(name, value)
    calls: list[tuple[object, ...]] = []

    @contextmanager
    def watched(*args: Any, **settings: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr("sslcli.distributed.watchdog.join", lambda member, limit: None)
    monkeypatch.setattr("sslcli.distributed.watchdog.watched", watched)
    monkeypatch.setattr(
        "torch.distributed.init_process_group",
        lambda backend, timeout, device_id: calls.append(("join", backend, device_id)),
    )
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: calls.append(("leave",)))
    device = devices.pick_device("auto")
    devices.prepare(device, deterministic=False)
    with processes.process_group(device, limit=60, end=lambda message: None):
        assert calls == [("join", "cpu:gloo,cuda:nccl", device)]
    assert calls[1:] == [("leave",)]
    assert one_gpu == [0]
    with pytest.raises(ValueError, match="a step"), processes.process_group(device, limit=60, end=lambda message: None):
        raise ValueError("a step")
    assert calls[2:] == [("join", "cpu:gloo,cuda:nccl", device)]  # destroying the group would wait for other processes


def test_a_method_is_placed_on_the_gpu_whole(one_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Move tensors to `meta` instead of the GPU."""
    to, given = nn.Module.to, []

    def to_meta(module: nn.Module, device: torch.device) -> nn.Module:
        given.append(device)
        return to(module, "meta")

    monkeypatch.setattr(nn.Module, "to", to_meta)
    method = SimCLR(Small(width=4, image_size=32))
    move_to_device(method, TRAIN, devices.pick_device("auto"))
    assert given == [torch.device("cuda", 0)]
    assert {tensor.device.type for tensor in method.state_dict().values()} == {"meta"}


def test_the_peak_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 5e7 < devices.peak_memory(torch.device("cpu")) < 5e11
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 7 if device.index == 1 else 0)
    assert devices.peak_memory(torch.device("cuda", 1)) == 7


def test_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    monkeypatch.setattr("torch.mps.synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda:1", "mps"):
        devices.synchronize(torch.device(name))
    assert waited == [torch.device("cuda", 1), "mps"]


def test_random_states_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[list[torch.device]] = []
    states = {"mps": torch.ones(1)}
    fork_rng = torch.random.fork_rng

    def fork(devices: list[torch.device]) -> Any:
        forked.append(devices)
        return fork_rng(devices=[])

    monkeypatch.setattr("torch.random.fork_rng", fork)
    monkeypatch.setattr("torch.mps.get_rng_state", lambda: states["mps"])
    monkeypatch.setattr("torch.mps.set_rng_state", lambda state: states.update(mps=state))
    before = torch.get_rng_state()
    for name in ("cpu", "cuda:1", "mps"):
        with devices.unchanged_random_state(torch.device(name)):
            torch.rand(3)
            states["mps"] = torch.zeros(1) if name == "mps" else states["mps"]
        assert torch.equal(torch.get_rng_state(), before)
        assert states["mps"] == 1
    assert forked == [[], [torch.device("cuda", 1)], []]


def test_settings_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.WORKSPACE, "as before")
    torch.set_deterministic_debug_mode("default")

    def settings() -> list[object]:
        flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        return [torch.get_num_threads(), torch.get_deterministic_debug_mode(), os.environ[devices.WORKSPACE], *flags]

    before = settings()
    with devices.unchanged_settings():
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_float32_matmul_precision("medium")
        os.environ[devices.WORKSPACE] = "changed"
        devices.prepare(torch.device("cpu"), deterministic=False)
        devices.prepare(torch.device("cpu"), deterministic=True)
        assert settings() != before
    assert settings() == before


def test_the_number_of_threads_is_the_first_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    before = torch.get_num_threads()
    try:
        for requested, threads, expected in (("2", 3, 3), ("2", None, 2), ("", None, 6)):
            monkeypatch.setenv("OMP_NUM_THREADS", requested)
            devices.set_threads(threads)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_only_copies_to_cuda_do_not_wait_and_read_pinned_memory() -> None:
    calls: list[object] = []

    class Values(torch.Tensor):
        def to(self, *_: Any, **options: Any) -> Any:
            calls.append(options.get("non_blocking"))
            return self

        def pin_memory(self, *_: Any) -> Any:
            calls.append("pinned")
            return self

    values = torch.zeros(2).as_subclass(Values)
    for name, expected in (("cuda:1", [None, "pinned", True]), ("mps", [False]), ("cpu", [False])):
        calls.clear()
        devices.copy_to(torch.device(name), values)
        assert calls == expected


def test_copies_have_the_dtype_that_is_asked_for() -> None:
    values = torch.arange(3)
    assert devices.copy_to(torch.device("cpu"), values) is values
    copied = devices.copy_to(torch.device("meta"), values, torch.float32)
    assert (copied.device.type, copied.dtype, copied.shape) == ("meta", torch.float32, (3,))


def test_a_constant_is_created_once_and_can_be_used_in_training() -> None:
    with torch.inference_mode():
        first = devices.constant((0.25, 2.0), torch.float32, torch.device("cpu"))
    assert devices.constant((0.25, 2.0), torch.float32, torch.device("cpu")) is first
    weight = torch.ones(2, requires_grad=True)
    (weight * first).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.25, 2.0]


def test_the_gpu_of_the_caller_is_selected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[int] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", selected.append)
    with devices.unchanged_settings():
        selected.append(0)
    assert selected == [0, 1]
