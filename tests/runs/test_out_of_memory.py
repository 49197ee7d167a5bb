from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from command_line import SMALL, Cli, composed
from sslcli.config.run_config import RunConfig
from sslcli.errors import is_out_of_memory
from sslcli.evaluation import features
from sslcli.runs import out_of_memory, worker
from sslcli.runs.out_of_memory import memory_usage, training_message

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is free."
)


def cpu_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def numpy_error() -> MemoryError:
    with pytest.raises(MemoryError) as caught:
        np.empty(2**60, dtype=np.uint8)
    return caught.value


def test_errors_of_all_allocators_are_recognized() -> None:
    assert is_out_of_memory(CUDA)
    assert is_out_of_memory(cpu_error())
    assert is_out_of_memory(numpy_error())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def message(error: BaseException, *overrides: str, has_negatives: bool = True) -> str:
    config = RunConfig.from_plain(composed("train", *overrides))
    return training_message(error, config, has_negatives=has_negatives)


def test_the_message_names_the_allocation_and_only_keys_that_still_help() -> None:
    said = message(CUDA, "train.batch_size=256", "train.accumulate=2")
    assert said.startswith("out of memory (Tried to allocate 2.00 GiB). ")
    assert (
        "train.accumulate=4 halves the images per forward pass (now 128, which also halves in-batch negatives; "
        "train.cached_gradients=true keeps them)" in said
    )
    assert "train.activation_checkpointing=true" in said
    said = message(CUDA, "train.activation_checkpointing=true", "train.cached_gradients=true", "train.precision=bf16")
    assert "activation_checkpointing" not in said
    assert "negatives" not in said
    assert "bf16" not in said
    assert "negatives" not in message(CUDA, has_negatives=False)
    assert "train.precision=bf16" in message(CUDA, "train.precision=fp32")
    assert "can't allocate memory: you tried to allocate 1152921504606846976 bytes" in message(cpu_error())
    assert "out of memory (MemoryError)" in message(MemoryError())


def test_sharded_runs_and_passes_of_two_images_get_remedies_that_they_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    said = message(CUDA, "train.batch_size=4", "train.accumulate=2")
    assert "train.accumulate" not in said
    assert "train.batch_size" not in said
    assert "reduce dataset.image_size or choose a smaller backbone (a pass has only 2 images)" in said
    monkeypatch.setattr("sslcli.distributed.collectives.world_size", lambda: 2)
    said = message(CUDA, "train.sharding=fsdp", "train.batch_size=256")
    assert "train.accumulate=2 halves the images per forward pass (now 128, which also halves in-batch neg" in said
    assert "more processes (now 2) hold smaller parts" in said
    assert "find_batch_size" not in said
    assert "cached_gradients" not in said
    assert "reduce train.batch_size (now 256)" in said


def test_a_number_of_micro_batches_that_does_not_divide_the_batch_is_not_advised() -> None:
    assert "train.accumulate=8 halves" in message(CUDA, "train.batch_size=104", "train.accumulate=4")
    assert "train.accumulate" not in message(CUDA, "train.batch_size=100", "train.accumulate=4")


def test_what_takes_the_memory_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the memory of a GPU; all tensors are on the CPU."""
    method = nn.BatchNorm1d(10**6)  # parameters of 8 MB, buffers of 8 MB
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=2 * 10**9))
    listed = memory_usage(method, optimizer, torch.device("cuda", 0))
    assert "parameters 0.008, gradients 0.000, optimizer state (it is created by the first step) 0.000," in listed
    assert "buffers (the largest is running_mean) 0.008, activations 0.984." in listed
    assert listed.endswith("The peak memory is 1.00 GB of 2.00 GB")
    method(torch.ones(2, 10**6)).sum().backward()
    optimizer.step()
    assert "gradients 0.008, optimizer state 0.008, buffers" in memory_usage(method, optimizer, torch.device("cpu"))


def test_tensors_that_take_more_than_the_peak_leave_nothing_for_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "peak_memory", lambda device: 0)
    assert "and the program 0.000. The peak" in memory_usage(nn.Linear(2, 2), None, torch.device("cpu"))


@pytest.mark.parametrize("stage", ["trial", "move_to_device", "dry_run", "train"])
def test_a_run_without_memory_ends_with_a_message(stage: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise CUDA

    monkeypatch.setattr(worker, stage, fail)
    ended = cli("ssl-train", *SMALL, "run_dir=run", f"dry_run={str(stage == 'dry_run').lower()}")
    assert ended.code == 2
    assert "ssl-train: out of memory (Tried to allocate 2.00 GiB). To use less memory" in ended.err
    assert "reduce train.batch_size (now 32)" in ended.err
    assert re.search(
        r"\nMemory of this process on cpu, in GB: parameters .* The peak memory is \d+\.\d\d GB", ended.err
    )
    assert "Traceback" not in ended.err
    if stage == "train":
        assert "Memory of this process" in Path("run/console.log").read_text()


def test_a_trial_of_a_sharded_run_without_memory_is_left_out(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial of a sharded run is on the CPU, but its training is not."""

    def fail(*arguments: object, **named: object) -> None:
        raise cpu_error()

    monkeypatch.setattr(worker, "trial", fail)
    assert cli("ssl-train", *SMALL, "run_dir=run", "train.sharding=fsdp", "train.max_steps=1").code == 0


def test_an_evaluation_without_memory_ends_with_a_message(
    run_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise cpu_error()

    monkeypatch.setattr(features, "plain_batches", fail)
    ended = cli("ssl-eval", f"run={run_dir}", "cache=false", "batch_size=64", "precision=fp32")
    assert ended.code == 2
    assert "ssl-eval: out of memory (DefaultCPUAllocator" in ended.err
    assert "set batch_size=32 (now 64), " in ended.err
    assert "precision=bf16, or a dataset.limit, for fewer images. The peak" in ended.err
    assert re.search(r"The peak memory is [\d.]+ GB", ended.err)
    assert "Traceback" not in ended.err
