"""scripts/bench/gpu.py: every kind of row runs on the CPU at toy size; results are kept, continued and refused."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
KINDS = [
    "step/byol/resnet50_224_b256/eager",
    "loader/8_workers",
    "training/memory",
    "lars",
    "sync_batch_norm",
    "color",
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, ModuleType]]:
    """The modules of the benchmark by name."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    monkeypatch.setenv("BENCH_FOLDER", str(tmp_path))
    monkeypatch.setenv("GPU_BENCH_DEVICE", "cpu")
    monkeypatch.setenv("GPU_BENCH_SECONDS", "0")
    before = set(sys.modules)
    yield {name: importlib.import_module(name) for name in ("gpu", "gpu_rows", "gpu_timing", "gpu_table")}
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH:
            del sys.modules[name]


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_every_kind_is_measured(name: str, bench: dict[str, ModuleType]) -> None:
    plan = bench["gpu_timing"].Plan.from_environment()
    found = bench["gpu_rows"].ROWS[name].measure("sslcli", plan)
    assert found["ms"] > 0
    assert found["steps"] == 4
    assert ("images_per_s" in found) is (name not in ("lars", "sync_batch_norm"))


def test_rows_have_the_methods_and_workloads_that_exist(bench: dict[str, ModuleType]) -> None:
    rows = bench["gpu_rows"]
    assert set(rows.SHORT) <= set(rows.ROWS)
    assert len(rows.SHORT) == 6
    assert {name.split("/")[1] for name in rows.STEPS} >= {"simclr", "moco_v2", "byol"}
    assert rows.ROWS["step/simclr/resnet18_32_b1024/compile"].sides == ("sslcli", "lightly best")


def test_the_busy_time_of_a_gpu_counts_overlapping_kernels_once(bench: dict[str, ModuleType]) -> None:
    assert bench["gpu_timing"].covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]) == 4.0


def test_steps_of_a_gpu_are_timed_between_events_and_counted(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is simulated: a step takes 4 ms, waits once, launches 2 kernels, and keeps the GPU busy for 1 ms."""
    steps = 0

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.step = steps

        def elapsed_time(self, other: Event) -> float:
            return 4.0 * (other.step - self.step)

    def step() -> None:
        nonlocal steps
        steps += 1
        if mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    def set_mode(value: str) -> None:
        nonlocal mode
        mode = value

    mode, timing, group = "default", bench["gpu_timing"], 5
    for name, value in {
        "Event": Event,
        "synchronize": lambda device: None,
        "set_sync_debug_mode": set_mode,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 3e9,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    host = [event_of("cudaLaunchKernel", "CPU", 0, 1), event_of("cudaMemcpyAsync", "CPU", 0, 1)]
    kernels = [event_of("kernel", "CUDA", 0, 600), event_of("copy", "CUDA", 500, 1000)]
    annotation = event_of("Optimizer.step#SGD.step", "CUDA", 0, 4000, is_user_annotation=True)
    at = [shifted(event, 4000 * n) for n in range(group) for event in (*host, host[0], *kernels, annotation)]
    monkeypatch.setattr(timing, "profile", lambda activities: nullcontext(SimpleNamespace(events=lambda: at)))
    plan = timing.Plan(torch.device("cuda", 0), seconds=30.0, warmup=3, groups=4, group=group)
    found = timing.measure_steps(step, plan, images=64)
    assert found == pytest.approx(
        {"images_per_s": 16_000, "ms": 4, "steps": 20, "peak_gb": 3, "syncs": 1, "launches": 2, "idle_percent": 75}
    )
    assert mode == "default"
    assert steps == 3 + (1 + 4 + 1 + 1) * group


def event_of(name: str, device: str, start: float, end: float, *, is_user_annotation: bool = False) -> SimpleNamespace:
    """Return an event of the profiler, from `start` to `end` in microseconds."""
    time_range = SimpleNamespace(start=start, end=end)
    kind = getattr(torch.autograd.DeviceType, device)
    return SimpleNamespace(name=name, device_type=kind, time_range=time_range, is_user_annotation=is_user_annotation)


def shifted(event: SimpleNamespace, by: float) -> SimpleNamespace:
    time_range = SimpleNamespace(start=event.time_range.start + by, end=event.time_range.end + by)
    return SimpleNamespace(**vars(event) | {"time_range": time_range})


def simulated(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, *, interrupt_at: int = 0
) -> tuple[Any, list[str]]:
    """Return `main` with processes that measure nothing, and the list of the measurements.

    interrupt_at: the number of the measurement that is interrupted; 0 = none.
    """
    calls: list[str] = []

    def measure(name: str, side: str, limit: float, device: str) -> dict[str, Any]:
        calls.append(f"{name}/{side}")
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        return (
            {"images_per_s": 10.0, "ms": 2.5, "steps": 4, "peak_gb": 1.0}
            if side == "sslcli"
            else {"error": "it | failed"}
        )

    monkeypatch.setattr(bench["gpu"], "measure", measure)
    monkeypatch.setattr(bench["gpu"], "is_installed", lambda side: side != "lightly best")
    return bench["gpu"].main, calls


def test_an_interrupted_benchmark_continues_and_measures_nothing_again(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, calls = simulated(bench, monkeypatch, interrupt_at=4)
    line = ["step/simclr/*/eager", "--device", "cpu", "--out", str(tmp_path)]
    assert main(line) == 130
    assert "interrupted: run the same command again to continue" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "gpu.json").read_text())["results"]) == 3
    assert main(line) == 0
    assert len(calls) == 4 * 2 * 2 + 1  # rows, sides and processes; one was interrupted
    first = [call.rpartition("/")[2] for call in calls[:3]]
    assert first == ["sslcli", "lightly", "lightly"]  # the order alternates
    out = capsys.readouterr().out
    assert (
        "| step/simclr/resnet18_32_b256/eager | sslcli | 10 (10 to 10) | 2.5 (2.5 to 2.5) | 1 | - | - | - | 4 | 2 |"
        in out
    )
    assert "| step/simclr/resnet18_32_b256/eager | lightly | failed: it / failed |" in out
    assert "Left out: lightly best (lightly is not installed)" in out
    assert (tmp_path / "gpu.md").read_text().count("| sslcli |") == 4
    measured = len(calls)
    assert main(line) == 0
    assert len(calls) == measured
    monkeypatch.setattr(bench["gpu"], "is_installed", lambda side: True)
    assert main(line) == 0
    assert {call.rpartition("/")[2] for call in calls[measured:]} == {"lightly best"}


def test_what_cannot_be_measured_is_refused(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, calls = simulated(bench, monkeypatch)

    def refused(*line: str) -> str:
        assert main(line) == 2
        return capsys.readouterr().err

    said = refused("larz", "lars", "--device", "cpu")
    assert "there is no row larz" in said
    assert "step/byol/vit_small_224_b256/compile_deterministic\n" in said
    assert "no rows are given" in refused("--device", "cpu")
    assert "/proc/none cannot be written" in refused("lars", "--device", "cpu", "--out", "/proc/none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no CUDA device" in refused("lars")
    assert main(["lars", "--device", "cpu", "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["commands"] == [f"gpu.py lars --device cpu --out {tmp_path}"]
    assert stored["versions"].pop("torchvision")
    (tmp_path / "gpu.json").write_text(json.dumps(stored))
    assert main(["lars", "--device", "cpu", "--out", str(tmp_path)]) == 0  # torchvision was installed meanwhile
    (tmp_path / "gpu.json").write_text(json.dumps(stored | {"code": "0"}))
    calls.clear()
    assert "has results of other code: choose another directory" in refused(
        "color", "--device", "cpu", "--out", str(tmp_path)
    )
    assert calls == []


def test_the_script_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    line = ["lars", "--device", "cpu", "--sides", "sslcli", "--repeats", "1", "--out", str(tmp_path)]
    ended = subprocess.run([sys.executable, str(BENCH / "gpu.py"), *line], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    (result,) = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert (result["row"], result["side"], result["steps"]) == ("lars", "sslcli", 4)
    assert "Left out" not in ended.stdout
