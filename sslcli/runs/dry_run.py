"""`ssl-train dry_run=true`: what would happen, measured on two steps, with nothing kept but the views' picture."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

from sslcli.data.loader import Loader, plain_batches
from sslcli.engine.loop import Run, optimize
from sslcli.errors import ConfigError
from sslcli.report import pictures
from sslcli.report.console import duration
from sslcli.runs.build import Parts

STEPS = 2  # the first step also pays for setting up kernels and memory, so the second is the one to time


def dry_run(job: Run, parts: Parts) -> int:
    """Decode a few images, run a step, print what a run would cost, write the picture of the views."""
    count = job.monitor.settings.pictures or 8
    try:
        job.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir is {job.run_dir}, but it cannot be written ({error.strerror}): choose another"
        ) from error
    picture = save_views(job.loader, parts, count, job.run_dir)
    job.method.train()
    for micro_batches in job.loader.steps(0, min(STEPS, job.total_steps)):
        await_device(job.device)
        begun = time.perf_counter()
        scalars = optimize(job, job.method, micro_batches)
        job.method.after_step(0.0)
        await_device(job.device)
        taken = time.perf_counter() - begun
    per_image = sum(p.numel() for p in parts.method.backbone.parameters())
    facts = {
        "backbone parameters": per_image,
        "all parameters, momentum copies included": sum(p.numel() for p in parts.method.parameters()),
        "loss of a step": float(scalars["loss"]),
        "seconds a step, without data": taken,
        "estimated time, without data": duration(taken * job.total_steps),
        "peak memory (GB)": peak_memory(job.device),
        "views": str(picture),
    }
    job.screen.table("dry run", facts)
    for number, line in enumerate(parts.views.describe()):
        job.screen.say(f"  view {number}: {line}")
    job.screen.say("nothing was trained: leave dry_run out to start")
    return 0


def await_device(device: torch.device) -> None:
    """Wait for what a GPU was told to do: it goes on while this process does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, in GB: of the GPU where there is one, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def save_views(loader: Loader, parts: Parts, count: int, run_dir: Path) -> Path:
    """The picture of what a method trains on: originals in the top row, their views below.

    Each modality of a set with several has a row of its own.
    """
    batches = loader.steps(0, 1)
    batch = next(batches)[0]
    del batches
    source = parts.source
    chosen = source.splits["train"][batch.index[:count].cpu()]
    originals, _ = next(plain_batches(source, chosen, batch_size=count, workers=0))
    views = [parts.views.restore(view[:count].float().cpu(), mean=source.mean, std=source.std) for view in batch.views]
    path = run_dir / "views.png"
    rows = [row[:, place] for row in (originals.float() / 255, *views) for place in source.modality_channels]
    pictures.save(pictures.grid(rows), path)
    return path
