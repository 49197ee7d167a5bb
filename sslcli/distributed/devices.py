"""Device of a process, its memory, copies to it, deterministic kernels, and number of CPU threads."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from sslcli.distributed.processes import is_launched
from sslcli.errors import ConfigError
from sslcli.system import cpu
from sslcli.system.launch_variables import launched, local_world_size

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # environment variable of cuBLAS


def pick_device(name: str) -> torch.device:
    """Return the device of this process. A CUDA device is returned with its index, such as cuda:0.

    `name` is auto, cpu, mps, cuda or cuda:N. "auto" selects CUDA if CUDA is available, else the CPU. "auto" never
    selects MPS, because MPS is untested. Raises ConfigError if the device is not available. The message lists the
    available kinds of devices.
    """
    if name == "auto":
        name = "cuda" if "cuda" in available() else "cpu"
    if name == "mps" and is_launched():
        raise ConfigError(
            "device is 'mps', which does not support several processes: set device=cpu, or launcher=local"
        )
    kind = name.partition(":")[0]
    if kind not in available():
        raise ConfigError(f"device is {name!r}, but this machine has only: {', '.join(available())}")
    if name == "cuda":  # torch.cuda.set_device needs an index
        member = launched()
        rank = 0 if member is None else member.local_rank
        name = f"cuda:{rank % torch.cuda.device_count()}"
    elif name.startswith("cuda:") and is_launched() and local_world_size() > 1:
        raise ConfigError(
            f"device is {name!r}, but each process of a run needs its own GPU: set device=cuda, and select GPUs with "
            "CUDA_VISIBLE_DEVICES"
        )
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def available() -> list[str]:
    """Return the kinds of devices of this machine: cpu, and cuda and mps if they are available."""
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds.append("cuda")
    if torch.backends.mps.is_available():
        kinds.append("mps")
    return kinds


def uses_deterministic_kernels(setting: Literal["auto"] | bool, device: torch.device) -> bool:
    """Return the value of `train.deterministic` (`setting`) on `device`. "auto" is True on the CPU, else False.

    On a GPU, deterministic kernels are slower, and cuDNN cannot select its fastest kernels by measuring them.
    """
    return setting if isinstance(setting, bool) else device.type == "cpu"


def copy_to(device: torch.device, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return `values` on `device`, with the dtype `dtype` if it is given. A copy to a CUDA device does not block.

    Values on the CPU are first copied to pinned memory, because the driver may wait for the GPU before it reads other
    memory. torch keeps the pinned memory until the copy has ended.

    Copies to MPS block. A copy that does not block reads the memory of `values` later there, when the memory of a
    temporary tensor may already be in use again.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device, dtype, non_blocking=device.type == "cuda")
    return values.to(dtype or values.dtype).pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `values` as a tensor (len(values),) on `device`. It is shared by all calls; do not modify it.

    Only the first call copies the values to the device, so later calls do not wait for it.
    """
    with torch.inference_mode(False):  # tensors of the inference mode cannot be used in training
        return torch.tensor(values, dtype=dtype, device=device)


def prepare(device: torch.device, *, deterministic: bool) -> None:
    """Set the device of this process, and enable deterministic kernels if `deterministic` is True.

    If `deterministic` is True, torch warns about operations that have no deterministic kernel. Otherwise, cuDNN
    measures its kernels and selects the fastest one.

    On CUDA, float32 convolutions use TF32, which is torch's default. Float32 matrix products do not: their inputs would
    be rounded to 10 bits, and losses divide products of embeddings by temperatures such as 0.07.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")
    torch.set_deterministic_debug_mode("warn" if deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:  # without this variable, older versions of torch warn about every matrix product
        os.environ.setdefault(WORKSPACE, ":4096:8")


@contextmanager
def unchanged_settings() -> Iterator[None]:
    """Restore torch's global settings after the `with` block: all that `prepare` and `set_threads` change."""
    uses_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    threads, device = torch.get_num_threads(), torch.cuda.current_device() if uses_cuda else None
    deterministic, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic
    fills = fill.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    precision, workspace = torch.get_float32_matmul_precision(), os.environ.get(WORKSPACE)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if device is not None:
            torch.cuda.set_device(device)
        torch.set_deterministic_debug_mode(deterministic)
        fill.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn
        torch.set_float32_matmul_precision(precision)
        os.environ.pop(WORKSPACE, None)
        if workspace is not None:
            os.environ[WORKSPACE] = workspace


def synchronize(device: torch.device) -> None:
    """Wait until all kernels on a GPU are complete. Do nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the tensors on a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory(device: torch.device) -> int:
    """Return the memory of a CUDA device in bytes."""
    return torch.cuda.get_device_properties(device).total_memory


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore torch's random states of the CPU and of `device` after the `with` block."""
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            if mps is not None:
                torch.mps.set_rng_state(mps)


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of torch.

    If `threads` is None, the value of OMP_NUM_THREADS or MKL_NUM_THREADS is used if one is set. If neither is set, each
    process gets an equal fraction of the cores.
    """
    torch.set_num_threads(threads or cpu.requested_threads() or cpu.cores_per_process())
