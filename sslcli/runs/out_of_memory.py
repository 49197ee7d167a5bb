"""Messages for commands that ran out of memory. They list configuration keys that reduce the memory usage."""

from __future__ import annotations

from sslcli.config.run_config import EvalConfig, RunConfig
from sslcli.distributed import collectives


def training_message(error: BaseException, config: RunConfig) -> str:
    """Return the message of a training that ran out of memory.

    The message lists the settings that would reduce the memory usage and are not used yet.
    """
    settings, processes = config.train, collectives.world_size()
    per_pass = settings.batch_size // (settings.accumulate * processes)
    remedies = []
    if per_pass > 1:
        smaller = f"train.accumulate={2 * settings.accumulate} halves the images per forward pass"
        cached = "" if settings.cached_gradients else ", which also halves in-batch negatives"
        remedies.append(f"{smaller} (now {per_pass}{cached})")
    if not settings.activation_checkpointing and settings.compile is not True:
        remedies.append("train.activation_checkpointing=true keeps fewer activations, at the cost of speed")
    if settings.precision == "fp32":
        remedies.append("train.precision=bf16 halves activations")
    if processes > 1 and settings.sharding == "none":
        remedies.append("train.sharding=fsdp divides the parameters among the processes")
    remedies.append("reduce train.batch_size or dataset.image_size")
    return f"out of memory ({_cause(error)}). To use less memory: {'; '.join(remedies)}"


def evaluation_message(error: BaseException, config: EvalConfig) -> str:
    """Return the message of an evaluation that ran out of memory."""
    remedies = (
        [f"batch_size={max(1, config.batch_size // 2)} (now {config.batch_size})"] if config.batch_size > 1 else []
    )
    if "batch_size" in config.protocol:
        remedies.append(f"a protocol.batch_size below {config.protocol['batch_size']}")
    remedies.append("a dataset.limit, for fewer images")
    return f"out of memory ({_cause(error)}). To use less memory, set {', or '.join(remedies)}"


def _cause(error: BaseException) -> str:
    """Return the sentence in the message of `error` that names the failed allocation."""
    text = str(error).strip() or type(error).__name__
    for start in ("DefaultCPUAllocator", "Tried to allocate", "CUDA error"):
        text = text[text.find(start) :] if start in text else text
    return text.splitlines()[0].partition(". ")[0].rstrip(".")
