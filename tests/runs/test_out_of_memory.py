from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import SMALL, Cli, composed
from sslcli.config.run_config import RunConfig
from sslcli.errors import is_out_of_memory
from sslcli.evaluation import features
from sslcli.runs import worker
from sslcli.runs.out_of_memory import training_message

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


def message(error: BaseException, *overrides: str) -> str:
    return training_message(error, RunConfig.from_plain(composed("train", *overrides)))


def test_the_message_names_the_allocation_and_only_keys_that_still_help() -> None:
    said = message(CUDA, "train.batch_size=256", "train.accumulate=2")
    assert said.startswith("out of memory (Tried to allocate 2.00 GiB). ")
    assert (
        "train.accumulate=4 halves the images per forward pass (now 128, which also halves in-batch negatives)" in said
    )
    assert "train.activation_checkpointing=true" in said
    said = message(CUDA, "train.activation_checkpointing=true", "train.cached_gradients=true", "train.precision=bf16")
    assert "activation_checkpointing" not in said
    assert "negatives" not in said
    assert "bf16" not in said
    assert "train.precision=bf16" in message(CUDA, "train.precision=fp32")
    assert "can't allocate memory: you tried to allocate 1152921504606846976 bytes" in message(cpu_error())
    assert "out of memory (MemoryError)" in message(MemoryError())


def test_a_step_without_memory_ends_a_run_with_a_message(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise CUDA

    monkeypatch.setattr(worker, "train", fail)
    ended = cli("ssl-train", *SMALL, "run_dir=run")
    assert ended.code == 3
    assert "ssl-train: out of memory (Tried to allocate 2.00 GiB). To use less memory" in ended.err
    assert "Traceback" not in ended.err


def test_an_evaluation_without_memory_ends_with_a_message(
    run_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise cpu_error()

    monkeypatch.setattr(features, "plain_batches", fail)
    ended = cli("ssl-eval", f"run={run_dir}", "cache=false", "batch_size=64")
    assert ended.code == 3
    assert "ssl-eval: out of memory (DefaultCPUAllocator" in ended.err
    assert "set batch_size=32 (now 64)" in ended.err
