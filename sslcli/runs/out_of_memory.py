"""Messages for commands that ran out of memory: what takes the memory, and configuration keys that reduce it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslcli.config.run_config import EvalConfig, RunConfig
from sslcli.distributed import collectives
from sslcli.distributed.devices import peak_memory, total_memory
from sslcli.errors import ConfigError, is_out_of_memory
from sslcli.methods.base import Method


@contextmanager
def explained(
    config: RunConfig, method: Method, device: torch.device, optimizer: Optimizer | None = None
) -> Iterator[None]:
    """Convert out-of-memory errors in the `with` block to a ConfigError with `training_message`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = training_message(error, config, has_negatives=method.uses_in_batch_negatives)
        raise ConfigError(f"{message}\n{memory_usage(method, optimizer, device)}") from error


def training_message(error: BaseException, config: RunConfig, *, has_negatives: bool = False) -> str:
    """Return the message of a training that ran out of memory.

    The message lists the settings that would reduce the memory usage and are not used yet. `has_negatives` is True if
    the loss of the method uses in-batch negatives.
    """
    settings, processes = config.train, collectives.world_size()
    per_pass = settings.batch_size // (settings.accumulate * processes)
    remedies = []
    is_sharded = processes > 1 and settings.sharding == "fsdp"
    # An odd number does not split into two, and a pass of one image has neither batch statistics nor negatives.
    if per_pass % 2 == 0 and per_pass > 2:
        smaller = f"train.accumulate={2 * settings.accumulate} halves the images per forward pass"
        cached = ""
        if has_negatives and not settings.cached_gradients:
            keep = "" if is_sharded else "; train.cached_gradients=true keeps them"
            cached = f", which also halves in-batch negatives{keep}"
        remedies.append(f"{smaller} (now {per_pass}{cached})")
    if not settings.activation_checkpointing and settings.compile is not True:
        remedies.append("train.activation_checkpointing=true keeps fewer activations, at the cost of speed")
    if settings.precision == "fp32":
        remedies.append("train.precision=bf16 halves activations")
    if processes > 1 and settings.sharding == "none":
        remedies.append("train.sharding=fsdp divides the parameters among the processes")
    if is_sharded:
        remedies.append(f"more processes (now {processes}) hold smaller parts of the parameters each")
    if per_pass > 2:
        remedies.append(f"reduce train.batch_size (now {settings.batch_size}) or dataset.image_size")
        if not is_sharded:
            remedies.append("on a GPU, dry_run=true find_batch_size=true finds the largest train.batch_size")
    else:
        remedies.append(f"reduce dataset.image_size or choose a smaller backbone (a pass has only {per_pass} images)")
    return f"out of memory ({_cause(error)}). To use less memory: {'; '.join(remedies)}"


def memory_usage(method: nn.Module, optimizer: Optimizer | None, device: torch.device) -> str:
    """Return a line that lists what takes the memory of this process on `device`, in GB.

    Activations are not listed anywhere in torch. Their memory is the peak memory without all other tensors. On the CPU,
    the peak includes the program and its libraries.
    """
    parameters = list(method.parameters())
    buffers = {name: _bytes([buffer]) for name, buffer in method.named_buffers()}
    largest = max(buffers, key=lambda name: buffers[name], default="")
    state = [] if optimizer is None else [value for values in optimizer.state.values() for value in values.values()]
    parts = {
        "parameters": _bytes(parameters),
        "gradients": _bytes(parameter.grad for parameter in parameters),
        "optimizer state" if state else "optimizer state (it is created by the first step)": _bytes(state),
        f"buffers (the largest is {largest})" if largest else "buffers": sum(buffers.values()),
    }
    peak = peak_memory(device)
    rest = max(0, peak - sum(parts.values()))
    parts["activations" if device.type == "cuda" else "activations, images and the program"] = rest
    listed = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in parts.items())
    return f"Memory of this process on {device}, in GB: {listed}. The {_peak(device)}"


def _peak(device: torch.device) -> str:
    """Return a phrase with the peak memory of this process, and with the total memory if the device is a GPU."""
    peak = f"peak memory is {peak_memory(device) / 1e9:.2f} GB"
    if device.type != "cuda":
        return peak
    return f"{peak} of {total_memory(device) / 1e9:.2f} GB"


def _bytes(values: Iterable[object]) -> int:
    """Return the size of the local part of all tensors in `values`. Other values are ignored."""
    tensors = [collectives.local(value) for value in values if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def evaluation_message(error: BaseException, config: EvalConfig, device: torch.device) -> str:
    """Return the message of an evaluation that ran out of memory, with the settings that would reduce the usage."""
    remedies = (
        [f"batch_size={max(1, config.batch_size // 2)} (now {config.batch_size})"] if config.batch_size > 1 else []
    )
    if "batch_size" in config.protocol:
        remedies.append(f"a protocol.batch_size below {config.protocol['batch_size']}")
    if config.precision == "fp32":
        remedies.append("precision=bf16")
    remedies.append("a dataset.limit, for fewer images")
    return f"out of memory ({_cause(error)}). To use less memory, set {', or '.join(remedies)}. The {_peak(device)}"


def _cause(error: BaseException) -> str:
    """Return the sentence in the message of `error` that names the failed allocation."""
    text = str(error).strip() or type(error).__name__
    for start in ("DefaultCPUAllocator", "Tried to allocate", "CUDA error"):
        text = text[text.find(start) :] if start in text else text
    return text.splitlines()[0].partition(". ")[0].rstrip(".")
