"""Every function with code for CUDA or MPS has a test that runs this code on the CPU, with the device simulated.

`REACHED` lists the functions. Tests of some functions are in this file, because only the simulated device is unusual.
A new function with such code fails the first test until it is listed with its test. `make gpu` runs the same code on a
GPU.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sslcli
from command_line import composed
from one_run import finish, make_run
from small_runs import make_folder
from sslcli.config.run_config import RunConfig
from sslcli.data import loader
from sslcli.data.sources.files import Folder
from sslcli.data.views.views import Views
from sslcli.distributed.elastic import run_processes
from sslcli.engine import checkpoint, resume
from sslcli.errors import ConfigError
from sslcli.nn.batch_norm import SyncBatchNorm
from sslcli.runs import slurm_job
from sslcli.runs.assemble import suspicious_settings

GPU, MPS = torch.device("cuda", 0), torch.device("mps")
HERE = Path(__file__).parent
# File of sslcli and function with code for a device -> test file and test that reaches this code.
REACHED = dict(
    line.split()
    for line in """
data/device_copies.py:_finished data/test_device_copies.py:test_copies_run_one_batch_ahead_on_a_side_stream
data/device_copies.py:_on_side_stream data/test_device_copies.py:test_copies_run_one_batch_ahead_on_a_side_stream
data/device_copies.py:copy_batches data/test_device_copies.py:test_copies_run_one_batch_ahead_on_a_side_stream
data/loader.py:from_files test_device_branches.py:test_batches_of_files_are_pinned_for_a_gpu
data/loader.py:plain_batches test_device_branches.py:test_batches_of_files_are_pinned_for_a_gpu
data/num_workers.py:default_workers data/test_num_workers.py:test_default_follows_the_cores_of_a_process
data/resident.py:is_resident data/test_resident.py:test_setting_and_device
data/worker_server.py:_is_initialized data/test_worker_server.py:test_workers_are_forked_from_the_server
data/worker_server.py:start data/test_worker_server.py:test_the_server_starts_only_before_cuda_and_only_on_cuda
distributed/devices.py:available distributed/test_devices.py:test_kinds_of_devices_are_those_of_torch
distributed/devices.py:copy_to distributed/test_devices.py:test_only_copies_to_cuda_do_not_wait_and_read_pinned_memory
distributed/devices.py:peak_memory distributed/test_devices.py:test_the_peak_memory_is_that_of_the_device
distributed/devices.py:pick_device distributed/test_devices.py:test_each_process_of_a_node_takes_its_own_gpu
distributed/devices.py:prepare distributed/test_devices.py:test_one_process_on_one_gpu_starts
distributed/devices.py:synchronize distributed/test_devices.py:test_a_gpu_is_waited_for
distributed/devices.py:unchanged_random_state distributed/test_devices.py:test_random_states_are_restored
distributed/devices.py:unchanged_settings distributed/test_devices.py:test_the_gpu_of_the_caller_is_selected_again
distributed/elastic.py:run_processes test_device_branches.py:test_each_gpu_of_a_node_has_a_process
distributed/processes.py:process_group distributed/test_devices.py:test_processes_with_gpus_meet_over_nccl
engine/checkpoint.py:rng_state engine/test_checkpoint.py:test_random_states_of_a_gpu_are_stored_and_restored
engine/checkpoint.py:set_rng_state engine/test_checkpoint.py:test_random_states_of_a_gpu_are_stored_and_restored
engine/compilation.py:missing_requirement engine/test_compilation.py:test_what_a_machine_lacks_is_a_reason_or_an_error
engine/compilation.py:why_not engine/test_compilation.py:test_long_runs_on_a_gpu_are_compiled
engine/loop.py:parallel engine/test_loop.py:test_gradients_of_a_gpu_are_averaged_by_nccl
engine/precision.py:resolve engine/test_precision.py:test_auto_is_bf16_where_a_gpu_multiplies_it_without_emulation
engine/resume.py:environment_fingerprint test_device_branches.py:test_the_model_of_a_gpu_is_recorded
engine/resume.py:resume test_device_branches.py:test_a_run_on_mps_resumes_without_tensors_of_64_bits_there
evaluation/features.py:with_fallback evaluation/test_features.py:test_tensors_are_on_the_device_unless_it_lacks_memory
nn/modes.py:double_precision nn/test_modes.py:test_double_precision_is_float32_where_there_is_no_float64
nn/batch_norm.py:_uses_cuda_kernels test_device_branches.py:test_batch_norm_on_a_gpu_uses_cuda_kernels
runs/assemble.py:suspicious_settings test_device_branches.py:test_a_run_on_mps_warns
runs/batch_size_search.py:configured runs/test_batch_size_search.py:test_a_search_on_a_gpu_does_not_compile
runs/batch_size_search.py:release_memory runs/test_batch_size_search.py:test_memory_of_a_gpu_is_released
distributed/devices.py:total_memory runs/test_batch_size_search.py:test_memory_of_a_gpu_is_released
runs/out_of_memory.py:_peak runs/test_out_of_memory.py:test_what_takes_the_memory_is_listed
runs/out_of_memory.py:memory_usage runs/test_out_of_memory.py:test_what_takes_the_memory_is_listed
runs/slurm/job.py:check_gpus test_device_branches.py:test_a_node_without_its_gpus_is_refused
sweeps/slots.py:cuda_devices sweeps/test_slots.py:test_the_devices_are_those_that_the_sweep_may_see
sweeps/slots.py:slots_of sweeps/test_slots.py:test_a_named_gpu_takes_one_job_at_a_time_and_slurm_takes_all
""".strip().splitlines()
)


def functions_with_device_code() -> Iterator[str]:
    """Yield FILE:FUNCTION for each function of sslcli that names CUDA, MPS or NCCL in its code."""
    root = Path(sslcli.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(names_device(part) for part in code_of(node)):
                yield f"{path.relative_to(root).as_posix()}:{node.name}"


def code_of(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield the nodes of a function without its docstring and without inner functions."""
    pending: list[ast.AST] = list(function.body[ast.get_docstring(function) is not None :])
    while pending:
        node = pending.pop()
        yield node
        pending += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.FunctionDef)]


def names_device(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.partition(":")[0] in ("cuda", "mps") or "nccl" in node.value
    return isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda", "mps", "is_mps")


def test_every_function_with_code_for_a_device_is_listed_with_its_test() -> None:
    assert sorted(set(functions_with_device_code())) == sorted(REACHED)
    for place in REACHED.values():
        file, name = place.split(":")
        assert f"\ndef {name}(" in (HERE / file).read_text("utf-8"), place


@pytest.mark.parametrize("gpu", [True, False])
def test_batches_of_files_are_pinned_for_a_gpu(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "images", broken=0, per_class=20)
    options: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "val_fraction": 0.0, "workers": 0, "seed": 0}
    source = Folder(root=str(tmp_path / "images"), image_size=16, **options)
    device = GPU if gpu else torch.device("cpu")
    batches = loader.Loader(source, Views([{"count": 2}]), batch_size=8, accumulate=1, seed=0, device=device)
    pinned: list[bool] = []

    def iterate_batches(*arguments: object, pin_memory: bool, **options: object) -> Iterator[object]:
        pinned.append(pin_memory)
        return iter(())

    monkeypatch.setattr(loader, "iterate_batches", iterate_batches)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert list(batches.from_files(0, 1)) == []
    assert list(loader.plain_batches(source, torch.arange(4), batch_size=2, workers=0)) == []
    assert pinned == [gpu, gpu]


def test_each_gpu_of_a_node_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("sslcli.distributed.elastic.run_once", lambda line, count, place: counts.append(count) or {})
    for processes in (None, 2):
        assert run_processes([], processes=processes, max_restarts=0, on_message=pytest.fail) == 0
    assert counts == [3, 2]
    with pytest.raises(ConfigError, match="processes is 4, but this node has 3 CUDA devices"):
        run_processes([], processes=4, max_restarts=0, on_message=pytest.fail)


def test_the_model_of_a_gpu_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"model of {device}")
    run.device = GPU
    assert resume.environment_fingerprint(run)["device"] == "model of cuda:0"
    run.device = MPS
    assert resume.environment_fingerprint(run)["device"] == "mps"


def test_a_run_on_mps_resumes_without_tensors_of_64_bits_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(make_run(tmp_path, "train.max_steps=1"))
    load_newest, places = checkpoint.load_newest, list[torch.device]()

    def load(run_dir: Path, *, device: torch.device, **options: Any) -> Any:
        places.append(device)
        return load_newest(run_dir, device=device, **options)

    monkeypatch.setattr(checkpoint, "load_newest", load)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "model")
    run = make_run(tmp_path, "train.max_steps=1")
    run.device = MPS
    assert resume.resume(run) == 1
    assert places == [torch.device("cpu")]


def test_batch_norm_on_a_gpu_uses_cuda_kernels() -> None:
    images: Any = SimpleNamespace(is_cuda=True)
    assert SyncBatchNorm(2)._uses_cuda_kernels(images)
    assert not SyncBatchNorm(2, momentum=None)._uses_cuda_kernels(images)
    assert not SyncBatchNorm(2)._uses_cuda_kernels(torch.ones(2, 2))


def test_a_run_on_mps_warns(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    parts: Any = SimpleNamespace(method=run.method, source=run.loader.source)
    assert suspicious_settings(run, parts) == []
    run.device = MPS
    (warning,) = suspicious_settings(run, parts)
    assert warning.startswith("device=mps is not tested with sslcli")


def test_a_node_without_its_gpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["launcher=slurm", "launcher.gpus_per_node=4", f"run_dir={tmp_path}"]
    config = RunConfig.from_plain(composed("train", *line))
    monkeypatch.setattr(slurm_job, "stored_config", lambda path: config)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with pytest.raises(ConfigError, match="gpus_per_node is 4, but torch sees 3 GPUs on"):
        slurm_job.run_node(tmp_path, "localhost:0")
