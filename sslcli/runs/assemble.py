"""What a run is made of, whether that can be, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from sslcli.config.run_config import RunConfig
from sslcli.config.settings import MonitorSettings, TrainSettings, seconds
from sslcli.data.loader import Loader, plain_batches
from sslcli.distributed import collectives, processes
from sslcli.engine import fsdp, precision
from sslcli.engine.loop import Run
from sslcli.engine.monitor import Monitor
from sslcli.engine.stop import StopRequest
from sslcli.errors import ConfigError
from sslcli.evaluation.knn import bank_positions
from sslcli.evaluation.online import check_answers, knn_probe, unanswerable
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating
from sslcli.report import pictures
from sslcli.report.console import Screen
from sslcli.runs.build import Parts


def place(method: Method, settings: TrainSettings, device: torch.device) -> None:
    """Bring the method to the device, whole or this process's part of it."""
    if settings.activation_checkpointing:
        fsdp.recompute(method)
    if settings.sharding == "fsdp" and collectives.world_size() > 1:
        fsdp.shard(method, device, precision.resolve(settings.precision, device))
    method.to(device)  # buffers, where it is sharded


def build_loader(config: RunConfig, parts: Parts, device: torch.device) -> Loader:
    """The loader of a run."""
    return Loader(
        parts.source,
        parts.views,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        seed=config.seed,
        device=device,
        timeout=config.launcher.timeout_seconds,
    )


def check_batch(loader: Loader, parts: Parts) -> None:
    """Raise ConfigError where a BatchNorm would see a single image."""
    if loader.micro_batch_size < 2 and any(isinstance(module, _BatchNorm) for module in parts.method.modules()):
        raise ConfigError(
            f"train.batch_size is {loader.batch_size}, which leaves 1 image to a micro-batch of a process, but "
            f"BatchNorm needs 2: choose at least {2 * loader.batch_size}"
        )


def check_cached_gradients(method: Method, wanted: bool) -> None:
    """Raise ConfigError where the gradient of the method's loss cannot be taken in two halves."""
    name = type(method).__name__
    if wanted and not method.uses_in_batch_negatives:
        raise ConfigError(
            f"train.cached_gradients is true, but the loss of {name} does not compare the images of a batch, so "
            "train.accumulate alone gives its gradient: set train.cached_gradients=false"
        )
    if wanted and method.mixture is not None:
        raise ConfigError(
            "train.cached_gradients is true, but mixture mixes the images of a whole batch, which is never in memory "
            "then: choose one of them (mixture=null, or train.cached_gradients=false)"
        )


def assemble(
    config: RunConfig,
    parts: Parts,
    loader: Loader,
    optimizer: Optimizer,
    peak_lr: float,
    run_dir: Path,
    device: torch.device,
    screen: Screen,
) -> Run:
    """Everything a run is made of, the method in training mode and the generators at the run's seed."""
    settings, watched = config.train, config.monitor
    resolved = precision.resolve(settings.precision, device)
    monitor = Monitor(
        watched,
        log_every_steps=settings.log_every_steps,
        batch_size=settings.batch_size,
        steps_per_epoch=loader.steps_per_epoch,
        run_dir=run_dir,
        screen=screen,
        probe=probe_of(parts, watched, device, resolved, screen),
        draw=partial(draw_pictures, parts, watched.pictures, device) if draws(parts, watched) else None,
        together=fsdp.is_sharded(parts.method),
    )
    if settings.compile:
        parts.method.backbone.compile()
    torch.manual_seed(config.seed + 1_000_003 * (collectives.rank() + 1))
    return Run(
        method=parts.method,
        optimizer=optimizer,
        loader=loader,
        settings=settings,
        peak_lr=peak_lr,
        seed=config.seed,
        device=device,
        precision=resolved,
        run_dir=run_dir,
        config=config.values,
        screen=screen,
        monitor=monitor,
        stop=StopRequest(seconds("train.max_time", settings.max_time), begun=processes.begun()),
    )


def probe_of(
    parts: Parts, monitor: MonitorSettings, device: torch.device, resolved: str, screen: Screen
) -> Callable[[], dict[str, float]] | None:
    """The online k-NN, or None, saying why, where it cannot be measured."""
    if monitor.knn_every_epochs == 0:
        return None
    if not parts.source.has_labels or len(parts.source.splits["val"]) == 0:
        screen.say("k-NN is skipped: the images have no labels, or none are held out (dataset.val_fraction)")
        return None
    bank = bank_positions(parts.source, monitor.knn_images)
    try:
        check_answers(parts.source, bank)
    except ConfigError as error:
        screen.say(f"k-NN is skipped: {error}")
        return None
    if told := unanswerable(parts.source, bank, parts.source.splits["val"]):
        screen.warn(f"k-NN: of the held-out images {told}")
    measure = knn_probe(parts.method, parts.source, parts.views, monitor, device=device, precision=resolved)

    def probe() -> dict[str, float]:
        with fsdp.gathered(parts.method):
            return measure()

    return probe


def draws(parts: Parts, monitor: MonitorSettings) -> bool:
    """Whether the method has pictures of its own, and they are wanted."""
    return monitor.pictures > 0 and type(parts.method).pictures is not Method.pictures


def draw_pictures(parts: Parts, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The method's own pictures of a few held-out images (training images where none are held out)."""
    source, views = parts.source, parts.views
    positions = next(split for name in ("val", "train") if len(split := source.splits.get(name, torch.empty(0))))
    images, _ = next(plain_batches(source, positions[:count], batch_size=count, workers=0))
    prepared = views.finish(images.to(device).float() / 255, mean=source.mean, std=source.std)
    with (
        evaluating(parts.method),
        fsdp.gathered(parts.method),
        torch.no_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        found = parts.method.pictures(prepared)
    restore = partial(views.restore, mean=source.mean, std=source.std)
    return {name: pictures.grid([restore(row.float().cpu()) for row in rows]) for name, rows in found.items()}


def effective(job: Run, parts: Parts, config: RunConfig) -> dict[str, Any]:
    """What the settings come to: learning rate after scaling, steps, negatives, images a step."""
    settings, node = job.settings, config.optimizer
    processes = collectives.world_size()
    trainable = sum(p.numel() for p in parts.method.parameters() if p.requires_grad)
    held = sum(collectives.local(p).numel() for p in parts.method.parameters())
    split = {name: len(positions) for name, positions in parts.source.splits.items()}
    return {
        "training images": split["train"],
        "held-out images": split.get("val", 0),
        "images a step": settings.batch_size,
        "processes": processes,
        "micro-batches a step": settings.accumulate,
        "steps an epoch": job.loader.steps_per_epoch,
        "steps": job.total_steps,
        "warm-up steps": job.warmup_steps,
        "learning rate": job.peak_lr,
        "learning rate from": f"{node['lr']:g} for 256 images, scaling {settings.lr_scaling}",
        "trainable parameters": trainable,
        **({"parameters a process holds": held} if processes > 1 else {}),
        "backbone features": parts.method.backbone.num_features,
        **parts.method.effective(settings.batch_size // (1 if settings.cached_gradients else settings.accumulate)),
        "precision": job.precision,
        "device": str(job.device),
        "CPU threads a process": torch.get_num_threads(),
    }


def suspicious_settings(job: Run, parts: Parts) -> list[str]:
    """Settings that work and are seldom meant."""
    found = []
    length = parts.method.queue_length
    num_images = len(parts.source.splits["train"])
    if length > num_images:
        found.append(
            f"the queue holds {length:,} keys but there are {num_images:,} images, so views of one image are "
            "negatives of each other: method.queue_size=4096 is usual for small sets, with method.momentum=0.99"
        )
    settings = job.settings
    if settings.accumulate > 1 and not settings.cached_gradients and job.method.num_negatives(2):
        remedy = ": train.cached_gradients=true contrasts them all" if job.method.uses_in_batch_negatives else ""
        found.append(f"with train.accumulate the negatives within a batch are those of the micro-batch alone{remedy}")
    if job.device.type == "mps":
        found.append(
            "device=mps has not been tried with sslcli, and torch had BatchNorm in channels-last memory wrong there "
            "(pytorch issue 175189): compare a short run with device=cpu"
        )
    return found
