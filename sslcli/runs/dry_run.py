"""`ssl-train dry_run=true`: estimates time and memory of a run from two steps, and draws the views."""

from __future__ import annotations

import time
from pathlib import Path

from sslcli.data.loader import Loader, plain_batches
from sslcli.distributed.devices import peak_memory, synchronize
from sslcli.engine.loop import optimize
from sslcli.engine.run import Run
from sslcli.errors import ConfigError
from sslcli.report import pictures
from sslcli.report.console import duration
from sslcli.runs.length import newest_step
from sslcli.runs.parts import Parts

STEPS = 2  # only the second step is timed: the first step sets up kernels and memory


def dry_run(job: Run, parts: Parts) -> int:
    """Write the picture of the views, run two steps, print time, memory and parameters of a run, and return 0."""
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
        synchronize(job.device)
        start = time.perf_counter()
        job.method.before_step(0.0, 0.0)
        scalars = optimize(job, job.method, micro_batches)
        job.method.after_step(0.0)
        synchronize(job.device)
        elapsed = time.perf_counter() - start
    left = max(0, job.total_steps - newest_step(job.run_dir))
    facts = {
        "backbone parameters": sum(p.numel() for p in parts.method.backbone.parameters()),
        "all parameters, with momentum encoder": sum(p.numel() for p in parts.method.parameters()),
        "loss of one step": float(scalars["loss"]),
        "seconds per step, without data": elapsed,
        "steps to train": left if len(job.phases) == 1 else f"{left}, after {job.phases[-1].start} steps",
        "estimated time, without data": duration(elapsed * left),
        "peak memory (GB)": peak_memory(job.device) / 1e9,
        "views": str(picture),
    }
    job.screen.table("dry run", facts)
    for number, line in enumerate(parts.views.describe()):
        job.screen.say(f"  view {number}: {line}")
    job.screen.say("the dry run is complete, no checkpoint was saved: run the command without dry_run to train")
    return 0


def save_views(loader: Loader, parts: Parts, count: int, run_dir: Path) -> Path:
    """Write views.png and return its path.

    The top row contains `count` original images. Each row below contains one view of each of these images. If the
    dataset has several modalities, each modality has a row of its own, both for the original images and for each view.
    """
    batches = loader.steps(0, 1)
    batch = next(batches)[0]
    del batches
    source = parts.source
    chosen = source.splits["train"][batch.index[:count].cpu()]
    originals, _ = next(plain_batches(source, chosen, batch_size=count, workers=0))
    views = [parts.views.restore(view[:count].float().cpu(), mean=source.mean, std=source.std) for view in batch.views]
    path = run_dir / "views.png"
    rows = [row[:, part] for row in (originals.float() / 255, *views) for part in source.modality_channels]
    pictures.save(pictures.grid(rows), path)
    return path
