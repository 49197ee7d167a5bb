"""`ssl-train dry_run=true find_batch_size=true`: finds the largest batch size whose steps fit into the GPU's memory."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sslcli.config.run_config import RunConfig
from sslcli.data.order import epoch_length
from sslcli.distributed import collectives, watchdog
from sslcli.distributed.devices import peak_memory, synchronize, total_memory
from sslcli.distributed.processes import is_launched
from sslcli.engine import precision
from sslcli.engine.loop import optimize
from sslcli.engine.run import Run
from sslcli.errors import ConfigError, is_out_of_memory
from sslcli.runs.trial import draw

STEPS = 3  # per size; only the last step is timed: the first ones set up kernels and the state of the optimizer
MAX_FRACTION = 0.95  # of the GPU's memory. The rest is for collectives, k-NN and fragments between tensors


@dataclass(frozen=True)
class Attempt:
    """Result of the steps with one batch size, equal on all processes.

    Attributes:
        batch_size: images per step, over all processes and micro-batches.
        fits: True if the steps ran on all processes, and the peak memory is at most `MAX_FRACTION` of the memory.
        peak: maximum over the processes of the peak memory, in bytes; None if memory was exhausted.
        seconds: maximum over the processes of the time of a step, without data; None if memory was exhausted.
    """

    batch_size: int
    fits: bool
    peak: int | None = None
    seconds: float | None = None


def configured(config: RunConfig, device: torch.device) -> RunConfig:
    """Return the configuration of a search: without torch.compile, which would compile again for every batch size.

    Raises ConfigError if a search is not possible on the device, or with the sharding of the parameters.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"find_batch_size is true, but the device is {device.type}, where a step that needs too much memory slows "
            "the machine down or is killed instead of reporting an error: set find_batch_size=false, and compare the "
            "peak memory that dry_run=true prints for values of train.batch_size"
        )
    if config.train.sharding == "fsdp" and is_launched():
        raise ConfigError(
            "find_batch_size is true, but train.sharding is 'fsdp': a process that runs out of memory would leave the "
            "others waiting for its parameters. Set find_batch_size=false, and try values of train.batch_size"
        )
    return config.changed(train=config.values["train"] | {"compile": False})


def find_batch_size(job: Run) -> int:
    """Print a table of the batch sizes that were tried and the largest one that fits, and return 0.

    All processes must call this function. Raises ConfigError if no size fits.
    """
    divisor = job.settings.accumulate * collectives.world_size()
    num_images = epoch_length(len(job.loader.source.splits["train"]), job.loader.source.weights)
    unit = math.lcm(8, 2 * divisor)  # BatchNorm needs two images per forward pass
    if unit > num_images:
        unit = job.loader.batch_size
    largest = num_images // unit * unit
    if job.loader.is_resident:
        _ = job.loader.resident_images  # takes memory in every step
    job.method.train()
    for group in job.optimizer.param_groups:
        group["lr"] = 0.0  # random pixels must not let the weights diverge
    start = max(unit, job.loader.batch_size // unit * unit)
    attempts = search(lambda size: attempt(job, size), start=start, unit=unit, largest=largest)
    rows = {f"train.batch_size={tried.batch_size}": describe(tried, job.device) for tried in attempts}
    job.screen.table("batch sizes", rows)
    found = max((tried.batch_size for tried in attempts if tried.fits), default=None)
    if found is None:
        raise ConfigError(
            f"a step with train.batch_size={attempts[0].batch_size}, the smallest size that was tried, does not fit "
            "into the memory of the GPU: reduce dataset.image_size, choose a smaller backbone, or set "
            "train.activation_checkpointing=true"
        )
    limit = ", which is limited by the number of training images" if found == largest else ""
    job.screen.say(
        f"the largest train.batch_size that fits is {found}{limit}. To train with it, replace dry_run=true "
        f"find_batch_size=true by train.batch_size={found}"
    )
    return 0


def search(try_size: Callable[[int], Attempt], *, start: int, unit: int, largest: int) -> list[Attempt]:
    """Return all attempts of a search for the largest batch size that fits, ordered by size.

    The size is doubled until it does not fit, and then found by bisection. If `start` does not fit, smaller sizes are
    tried. All sizes are multiples of `unit`, and at most `largest`, which must also be a multiple.
    """
    attempts: list[Attempt] = []
    fitting, failing, size = 0, largest + unit, start
    while failing - fitting > unit:
        attempts.append(try_size(size))
        if attempts[-1].fits:
            fitting = size
        else:
            failing = size
        size = min(2 * fitting, largest) if failing > largest else (fitting + failing) // 2 // unit * unit
    return sorted(attempts, key=lambda tried: tried.batch_size)


def attempt(job: Run, batch_size: int) -> Attempt:
    """Try a batch size on all processes, and return the result on all processes.

    The processes do not communicate during the steps, since a process that runs out of memory would leave the others
    waiting. The memory of gathered embeddings is therefore not included.
    """
    watchdog.report_progress(f"steps with {batch_size} images")
    per_pass = batch_size // (job.settings.accumulate * collectives.world_size())
    with collectives.single_process():
        mine = measure(job, per_pass)
    results = collectives.gather_objects(mine)
    measured = [result for result in results if result is not None]
    if len(measured) < len(results):
        return Attempt(batch_size, fits=False)
    peak, total, seconds = zip(*measured, strict=True)
    fits = all(used <= MAX_FRACTION * each for used, each in zip(peak, total, strict=True))
    return Attempt(batch_size, fits, max(peak), max(seconds))


def measure(job: Run, per_pass: int) -> tuple[int, int, float] | None:
    """Run `STEPS` steps with `per_pass` images of random pixels per forward pass of this process.

    Return the peak memory and the memory of the GPU in bytes, and the time of the last step in seconds; or None if
    memory was exhausted.
    """
    release_memory(job)
    try:
        for _ in range(STEPS):
            micro_batches = [draw(job.loader, per_pass, job.device) for _ in range(job.settings.accumulate)]
            synchronize(job.device)
            start = time.perf_counter()
            job.method.before_step(0.0, 0.0)
            optimize(job, job.method, micro_batches)
            job.method.after_step(0.0)
            synchronize(job.device)
            seconds = time.perf_counter() - start
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return peak_memory(job.device), total_memory(job.device), seconds


def release_memory(job: Run) -> None:
    """Free the memory of earlier steps, also of a step that failed, and reset the peak memory."""
    job.optimizer.zero_grad(set_to_none=True)
    job.method.embeddings, job.method.assignments = (), None
    job.scaler = precision.grad_scaler(job.device, job.precision)  # a failed step leaves it between two calls
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)


def describe(tried: Attempt, device: torch.device) -> str:
    """Return the peak memory and the speed of an attempt as text."""
    if tried.peak is None or tried.seconds is None:
        return "out of memory"
    speed = f"{tried.batch_size / tried.seconds:,.0f} images/s without data"
    excess = "" if tried.fits else f", more than {MAX_FRACTION:.0%} of the memory"
    return f"peak {tried.peak / 1e9:.2f} of {total_memory(device) / 1e9:.2f} GB{excess}, {speed}"
