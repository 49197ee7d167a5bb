"""Assembly of the training loop of a run: loader, monitor, online k-NN, checks of settings, and the startup table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from sslcli.config.checks import seconds
from sslcli.config.run_config import RunConfig
from sslcli.config.settings import MonitorSettings, TrainSettings
from sslcli.data.image_sizes import enlargement_warning
from sslcli.data.loader import Loader, plain_batches
from sslcli.data.resident import resident_bytes
from sslcli.data.sources.base import Source
from sslcli.distributed import collectives, processes
from sslcli.distributed.devices import unchanged_random_state
from sslcli.engine import compilation, fsdp, precision
from sslcli.engine.monitor import Monitor
from sslcli.engine.optim import zero_momentum
from sslcli.engine.phases import LENGTH_KEYS, Phase
from sslcli.engine.run import Run
from sslcli.engine.slow_data import faster_data
from sslcli.engine.stop import StopRequest
from sslcli.errors import ConfigError
from sslcli.evaluation.knn import bank_positions, query_positions
from sslcli.evaluation.online import knn_probe
from sslcli.evaluation.splits import check_answers, check_readable, unanswerable, why_not_held_out
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating
from sslcli.report import pictures
from sslcli.report.console import Screen
from sslcli.runs.parts import Parts
from sslcli.system.cpu import cores_per_process

NOT_DETERMINISTIC = "off: resuming is not bit-exact"


def move_to_device(method: Method, settings: TrainSettings, device: torch.device) -> None:
    """Move the method to the device.

    If train.activation_checkpointing is true, also enable activation checkpointing for the backbone. If train.sharding
    is fsdp, also shard the method over the processes.
    """
    if settings.activation_checkpointing:
        fsdp.recompute(method)
    if settings.sharding == "fsdp" and collectives.world_size() > 1:
        fsdp.shard(method, device, precision.resolve(settings.precision, device))
    method.to(device)  # for a sharded method, this moves the buffers


def build_loader(config: RunConfig, parts: Parts, device: torch.device) -> Loader:
    """Return the loader of a run's training images. `parts` contains the dataset and the views."""
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
    """Raise ConfigError if a BatchNorm layer would get a batch with a single image."""
    if loader.micro_batch_size < 2 and any(isinstance(module, _BatchNorm) for module in parts.method.modules()):
        raise ConfigError(
            f"train.batch_size is {loader.batch_size}, so a micro-batch of a process has 1 image, but BatchNorm needs "
            f"2: choose at least {2 * loader.batch_size}"
        )


def check_cached_gradients(method: Method, enabled: bool) -> None:
    """Raise ConfigError if train.cached_gradients is true (`enabled`) and the method does not support it."""
    name = type(method).__name__
    if enabled and not method.uses_in_batch_negatives:
        raise ConfigError(
            f"train.cached_gradients is true, but the loss of {name} does not use in-batch negatives, so "
            "train.accumulate alone gives the same gradient: set train.cached_gradients=false"
        )
    if enabled and method.mixture is not None:
        raise ConfigError(
            "train.cached_gradients is true, but mixture mixes the images of a whole batch, which cached gradients "
            "never hold in memory: set mixture=null or train.cached_gradients=false"
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
    phases: tuple[Phase, ...] = (),
    moved: tuple[str, ...] = (),
) -> Run:
    """Seed torch's random generator of this process, and return the training loop of a run.

    Args:
        config: the settings.
        parts: dataset, views and method. The method must already be on the device.
        loader: the loader of the training images.
        optimizer: the optimizer over the method's parameters.
        peak_lr: peak learning rate, after it was scaled to the batch size.
        run_dir: the run directory.
        device: the device of this process.
        screen: the progress display.
        phases: the phases of a run that has a config.yaml, or () for a new run. A new phase starts when a run is
            extended to a larger number of steps, see `Phase`.
        moved: names of the dataset settings with a path, such as `root`, that have changed since the run was first
            started.
    """
    settings, monitor_settings = config.train, config.monitor
    resolved = precision.resolve(settings.precision, device)
    draw = partial(draw_pictures, parts, monitor_settings.pictures, device)
    monitor = Monitor(
        monitor_settings,
        log_every_steps=settings.log_every_steps,
        batch_size=settings.batch_size,
        steps_per_epoch=loader.steps_per_epoch,
        run_dir=run_dir,
        screen=screen,
        probe=build_probe(parts, monitor_settings, device, resolved, screen),
        draw=draw if has_pictures(parts, monitor_settings) else None,
        together=fsdp.is_sharded(parts.method),
        measures_start=config.init is not None,
        seconds_waited=lambda: loader.seconds_waited,
        faster_data=faster_data(
            workers=loader.workers,
            cores=cores_per_process(),
            in_memory=parts.source.images is not None,
            can_cache=config.dataset.get("keep_decoded") == "none",
        ),
    )
    if resolved == "fp16":
        zero_momentum(optimizer)
    torch.manual_seed(config.seed + 1_000_003 * (collectives.rank() + 1))
    job = Run(
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
        phases=phases,
        may_differ=(*(LENGTH_KEYS if phases else ()), *moved),
        stop=StopRequest(seconds("train.max_time", settings.max_time), start_time=processes.start_time()),
    )
    job.compiled = compilation.why_not(settings, device, job.total_steps) is None
    if job.compiled:
        compilation.compile_method(parts.method, cached_gradients=settings.cached_gradients)
    return job


def build_probe(
    parts: Parts, monitor: MonitorSettings, device: torch.device, resolved: str, screen: Screen
) -> Callable[[], dict[str, float]] | None:
    """Return the online k-NN probe: a function that measures the k-NN accuracy of the method during training.

    Return None if k-NN is turned off. If no images are held out for validation, or if the training images have fewer
    than two classes, print the reason and return None.

    `resolved` is the precision of forward passes: fp32, bf16 or fp16. monitor.knn_split selects the images that k-NN
    classifies. Raises ConfigError if none of these images can be read, or if monitor.knn_split is test and the dataset
    has no test images.
    """
    if monitor.knn_every_epochs == 0:
        return None
    queries = parts.source.splits.get(monitor.knn_split, torch.empty(0))
    if len(queries) == 0 and monitor.knn_split == "test":
        raise ConfigError(
            f"monitor.knn_split is 'test', but {parts.source.name} has no test images: set monitor.knn_split=val"
        )
    if len(queries) == 0:
        screen.say(f"k-NN is skipped: {why_not_held_out(parts.source)}")
        return None
    queries = query_positions(parts.source, monitor.knn_split, monitor.knn_queries)
    bank = bank_positions(parts.source, monitor.knn_images)
    try:
        check_answers(parts.source, bank)
    except ConfigError as error:
        screen.say(f"k-NN is skipped: {error}")
        return None
    if warning := unanswerable(parts.source, bank, queries):
        screen.warn(f"k-NN: of the images of {monitor.knn_split} {warning}")
    check_readable(parts.source, queries, monitor.knn_split)
    return knn_probe(parts.method, parts.source, parts.views, monitor, device=device, precision=resolved)


def knn_queries(source: Source, monitor: MonitorSettings) -> str | None:
    """Return a text that describes the images that the online k-NN classifies, or None if there is no online k-NN."""
    total = len(source.splits.get(monitor.knn_split, torch.empty(0)))
    if monitor.knn_every_epochs == 0 or total == 0:
        return None
    queries = len(query_positions(source, monitor.knn_split, monitor.knn_queries))
    bank = bank_positions(source, monitor.knn_images)
    used = ""
    if monitor.knn_split == "val":
        used = ", pre-trained on without labels" if source.has_val_in_train else ", not pre-trained on"
    count = f"{queries:,}" if queries == total else f"{queries:,} of {total:,}"
    return f"{count} images of {monitor.knn_split}{used}; bank: {len(bank):,} other training images"


def has_pictures(parts: Parts, monitor: MonitorSettings) -> bool:
    """Return True if pictures are saved during training.

    Pictures are grids of images, which `Method.pictures` returns. They are saved if the class of the method overrides
    `pictures` and if monitor.pictures is not 0.
    """
    return monitor.pictures > 0 and type(parts.method).pictures is not Method.pictures


def draw_pictures(parts: Parts, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the method's pictures for `count` images: a mapping from a name to a grid of images (3, H, W) in [0, 1].

    If the split "val" is not empty, the `count` images are from this split, else they are training images.
    """
    source, views = parts.source, parts.views
    positions = next(split for name in ("val", "train") if len(split := source.splits.get(name, torch.empty(0))))
    images, _ = next(plain_batches(source, positions[:count], batch_size=count, workers=0))
    prepared = views.finish(images.to(device).float() / 255, mean=source.mean, std=source.std)
    with (
        evaluating(parts.method),
        fsdp.gathered(parts.method),
        torch.no_grad(),
        unchanged_random_state(device),
    ):
        found = parts.method.pictures(prepared)
    restore = partial(views.restore, mean=source.mean, std=source.std)
    return {name: pictures.grid([restore(row.float().cpu()) for row in rows]) for name, rows in found.items()}


def startup_table(job: Run, parts: Parts, config: RunConfig) -> dict[str, Any]:
    """Return the rows of the startup table by title: images, steps, learning rate, negatives, parameters, device."""
    settings, node = job.settings, config.optimizer
    processes = collectives.world_size()
    trainable = sum(p.numel() for p in parts.method.parameters() if p.requires_grad)
    local_parameters = sum(collectives.local(p).numel() for p in parts.method.parameters())
    part = parts.method.evaluated_part
    split = {name: len(positions) for name, positions in parts.source.splits.items()}
    not_compiled = compilation.why_not(settings, job.device, job.total_steps)
    return {
        "training images": split["train"],
        "val images": split.get("val", 0),
        **({"test images": split["test"]} if split.get("test") else {}),
        **({"k-NN queries": queries} if (queries := knn_queries(parts.source, config.monitor)) else {}),
        "images per step": settings.batch_size,
        "processes": processes,
        "micro-batches per step": settings.accumulate,
        "steps per epoch": job.loader.steps_per_epoch,
        "steps": job.total_steps,
        "warm-up steps": job.warmup_steps,
        **({"steps with a frozen backbone": job.frozen_steps} if job.frozen_steps else {}),
        "learning rate": job.peak_lr,
        "base learning rate": f"{node['lr']:g} at batch size 256, {settings.lr_scaling} scaling",
        "trainable parameters": trainable,
        **({"parameters per process": local_parameters} if processes > 1 else {}),
        "backbone features": parts.method.backbone.num_features,
        **({} if part == Method.evaluated_part else {"evaluated part": part}),
        **parts.method.effective(settings.batch_size // (1 if settings.cached_gradients else settings.accumulate)),
        "precision": job.precision,
        "device": str(job.device),
        **resident_row(job),
        "deterministic kernels": "on" if torch.are_deterministic_algorithms_enabled() else NOT_DETERMINISTIC,
        "torch.compile": "on" if not_compiled is None else f"off: {not_compiled}",
        "CPU threads per process": torch.get_num_threads(),
        **({} if parts.source.images is not None else {"data workers per process": job.loader.workers}),
    }


def resident_row(job: Run) -> dict[str, str]:
    """Return the row of the startup table about images in the memory of the GPU, for a dataset in memory on a GPU."""
    source = job.loader.source
    if source.images is None or job.device.type == "cpu":
        return {}
    size = f"{resident_bytes(source) / 1e6:,.0f} MB"
    return {"images on the device": size if job.loader.is_resident else f"no ({size}, dataset.resident)"}


def suspicious_settings(job: Run, parts: Parts) -> list[str]:
    """Return one warning for each setting that is valid but usually unintended."""
    found = [enlarged] if collectives.is_main() and (enlarged := enlargement_warning(parts.source)) else []
    length = parts.method.queue_length
    num_images = len(parts.source.splits["train"])
    if length > num_images:
        largest = 2 ** (num_images.bit_length() - 1)
        own = "an image is also compared with earlier embeddings of itself"
        remedy = f"use method.queue_size={min(4096, largest)}"
        if (parts.method.num_negatives(job.loader.micro_batch_size) or 0) >= length:
            own = "views of the same image are negatives of each other"
            remedy += ", and a method.momentum of about 0.99"
        found.append(f"the queue holds {length:,} keys but there are {num_images:,} images, so {own}: {remedy}")
    settings = job.settings
    wanted = round(settings.warmup_epochs * job.loader.steps_per_epoch)
    # Do not warn about the default of one epoch: it is intended to be shortened in short runs.
    if wanted > job.warmup_steps and settings.warmup_epochs > 1:
        found.append(
            f"train.warmup_epochs={settings.warmup_epochs:g} is {wanted:,} steps, but the warmup takes at most a "
            f"quarter of a run, here {job.warmup_steps:,} of {job.total_steps:,} steps: lower train.warmup_epochs, or "
            "train longer"
        )
    wanted = round(settings.freeze_backbone_epochs * job.loader.steps_per_epoch)
    if wanted > job.frozen_steps:
        found.append(
            f"train.freeze_backbone_epochs={settings.freeze_backbone_epochs:g} is {wanted:,} steps, but the backbone "
            f"is frozen for at most a quarter of a run, here {job.frozen_steps:,} of {job.total_steps:,} steps: lower "
            "train.freeze_backbone_epochs, or train longer"
        )
    if settings.clip_grad_by != "all" and settings.clip_grad is None:
        found.append(
            f"train.clip_grad_by={settings.clip_grad_by} has no effect, because train.clip_grad is null: set "
            "train.clip_grad to the largest norm"
        )
    if settings.schedule_length != 1 and settings.schedule != "cosine":
        found.append(
            f"train.schedule_length={settings.schedule_length:g} does not change the learning rate, because "
            f"train.schedule is {settings.schedule}: set train.schedule=cosine. It changes the other cosine schedules, "
            "such as that of the EMA momentum"
        )
    if settings.accumulate > 1 and not settings.cached_gradients and job.method.num_negatives(2):
        remedy = ": train.cached_gradients=true uses the whole batch" if job.method.uses_in_batch_negatives else ""
        found.append(f"with train.accumulate, in-batch negatives come only from the same micro-batch{remedy}")
    if job.device.type == "mps":
        found.append(
            "device=mps is not tested with sslcli, and BatchNorm of channels-last tensors was wrong there in torch "
            "(pytorch issue 175189): compare a short run with device=cpu"
        )
    return found
