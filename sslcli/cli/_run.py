"""One process of a training run: build everything, train, end with the right exit code."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from sslcli import atomic, checkpoint, distributed, heartbeat, launch, precision, sharding
from sslcli.allocator import keep_freed_memory
from sslcli.cli import _run_dir
from sslcli.cli._agree import check_agreement
from sslcli.cli._build import Parts, build_optimizer, build_parts
from sslcli.cli._dry import dry_run, save_views
from sslcli.cli._launch import tell
from sslcli.data.loader import Loader, plain_batches
from sslcli.data.workers import worker_died
from sslcli.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED, ConfigError, ProcessLost, Stopped, TrainingFailed
from sslcli.evaluate.online import knn_probe
from sslcli.methods.base import Method
from sslcli.nn import evaluating
from sslcli.report import pictures
from sslcli.report.console import Screen, percent, show
from sslcli.report.metrics import newest
from sslcli.settings import MonitorSettings, TrainSettings, seconds
from sslcli.stopping import StopRequest
from sslcli.train import Run, train
from sslcli.watch import Watch

WAIT = 2.0  # seconds, see _end
LOST_CONTACT = "another process of this run ended; start the same command again to go on"
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS)
DISK_ERRORS = (*REFUSALS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run(config: dict[str, Any]) -> int:
    """Carry out a checked configuration in this process; the exit code."""
    run_dir = Path(config["run_dir"])
    if launch.restarted():  # what is there is of this very command
        config = config | {"resume": "auto"}
    threading.excepthook = _leave_to_the_main_thread
    try:
        if _run_dir.is_finished(run_dir) and config["resume"] != "never" and not config["dry_run"]:
            _run_dir.check_resumable(run_dir, config)
            Screen(silent=launch.number() > 0).say(f"this run is finished already: {run_dir}{outcome(run_dir)}")
            return 0
        _run_dir.check_resumable(run_dir, config)
        device = launch.pick_device(config["device"])
        keep_freed_memory()
        launch.share_threads(config["launcher"]["threads"])
        set_determinism(config["train"]["deterministic"], compiled=config["train"]["compile"])
        limit = seconds("launcher.timeout", config["launcher"]["timeout"])
        assert limit is not None
        with launch.process_group(device, limit=limit, end=partial(_end_a_hang, run_dir)):
            check_agreement(config)
            return _carry_out(config, run_dir, device)
    except ConfigError as error:
        return _end(str(error), EXIT_CONFIG)
    except ProcessLost as error:
        return _end(str(error), launch.exit_lost())
    except TrainingFailed as error:
        return _end(str(error), EXIT_FAILED)
    except Stopped as error:
        return EXIT_STOPPED if launch.number() > 0 else _end(str(error), EXIT_STOPPED)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # raised wherever the signal of the dying worker finds us
            return _end(str(worker_died(error)), launch.exit_lost())
        if launch.lost_contact(error):
            return _end(LOST_CONTACT, launch.exit_lost(), wait=2 * WAIT)  # the other process has the reason to tell
        raise
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        what = f"{error.filename or run_dir} cannot be written ({error.strerror})"
        if error.errno in REFUSALS:
            return _end(f"{what}: choose another run_dir, or change its permissions", EXIT_CONFIG)
        return _end(f"{what}: make room or mend the disk, then start the same command again to go on", EXIT_FAILED)


def _leave_to_the_main_thread(failure: threading.ExceptHookArgs) -> None:
    """Say nothing of a full disk that TensorBoard's thread found: the next thing to be written raises it again."""
    if not isinstance(failure.exc_value, OSError) or failure.exc_value.errno not in DISK_ERRORS:
        threading.__excepthook__(failure)


def _end(message: str, code: int, *, wait: float | None = None) -> int:
    """Tell why this process ends; the exit code.

    What ends all processes is told once: the main one is first, and its launcher ends the others while they wait.
    """
    time.sleep((WAIT if launch.number() > 0 else 0.0) if wait is None else wait)
    print(f"ssl-train: {message}", file=sys.stderr, flush=True)
    return code


def _end_a_hang(run_dir: Path, message: str) -> None:
    """End this process from the thread that watches it; one process has the message, which goes first."""
    if message:
        tell(run_dir, message)
    else:
        time.sleep(WAIT)
    os._exit(EXIT_FAILED)


def _carry_out(config: dict[str, Any], run_dir: Path, device: torch.device) -> int:
    main, dry = distributed.is_main(), config["dry_run"]
    parts = build_parts(config, trust=config["trust"])
    loader = build_loader(config, parts, device)
    check_batch(loader, parts)
    check_cached_gradients(parts.method, config["train"]["cached_gradients"])
    place(parts.method, TrainSettings(**config["train"]), device)
    optimizer, peak_lr = build_optimizer(config, parts.method)
    held = hold(run_dir, patience=patience_of(config)) if main and not dry else None
    if held is not None:
        _run_dir.check_resumable(run_dir, config)  # once more, now that nobody else can change it
    with Screen(None if dry else run_dir / "console.log", silent=not main) as screen:
        job = assemble(config, parts, loader, optimizer, peak_lr, run_dir, device, screen)
        try:
            facts = effective(job, parts, config)
            screen.table(f"{config['method']['_target_'].rpartition('.')[2]}: {run_dir}", facts)
            for warning in doubts(job, parts):
                screen.warn(warning)
            if dry:
                job.stop.close()  # an interrupt ends it at once
                return dry_run(job, parts)
            if main:
                _run_dir.describe(run_dir, config, effective=facts, device=str(device), threads=torch.get_num_threads())
                prepare_watch(job, parts, config)
            train(job)
        except Stopped as error:
            screen.write(str(error))
            if error.by_signal and config["launcher"]["kind"] == "slurm":
                want_requeue(run_dir, error)
            raise
        except (ConfigError, TrainingFailed) as error:
            screen.write(str(error))
            raise
        finally:
            job.stop.close()
            job.watch.close()
            if not dry:
                list_bad_images(job)
        if main:
            atomic.replace(run_dir / "done", b"")
        screen.say(f"done: {run_dir}{outcome(run_dir)}")
    if held is not None:
        held.close()
    return 0


def patience_of(config: dict[str, Any]) -> float:
    """Seconds to wait for the run directory.

    When Slurm starts a job again because a node is lost, the processes on that node hold the directory until they
    notice, which takes `launcher.timeout` at most.
    """
    limit = seconds("launcher.timeout", config["launcher"]["timeout"])
    return 0.0 if limit is None or int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0 else limit + 60


def hold(run_dir: Path, *, patience: float) -> IO[str]:
    """Lock the run directory. Raises ConfigError where another run holds it for longer than `patience`, in seconds."""
    begun = time.monotonic()
    while True:
        try:
            return _run_dir.lock(run_dir)
        except ConfigError:
            if time.monotonic() - begun > patience:
                raise
            heartbeat.sign("waiting for the run directory")


def want_requeue(run_dir: Path, why: Stopped) -> None:
    """Leave word for the job's script that the run is saved and wants to go on; no process ends before."""
    if distributed.is_main():
        atomic.replace(run_dir / "slurm" / "want_requeue", str(why).partition(";")[0].encode())
    distributed.barrier()


def place(method: Method, settings: TrainSettings, device: torch.device) -> None:
    """Bring the method to the device, whole or this process's part of it."""
    if settings.activation_checkpointing:
        sharding.recompute(method)
    if settings.sharding == "fsdp" and distributed.world_size() > 1:
        sharding.shard(method, device, precision.resolve(settings.precision, device))
    method.to(device)  # buffers, where it is sharded


def prepare_watch(job: Run, parts: Parts, config: dict[str, Any]) -> None:
    """At the start of a run, draw its views; give TensorBoard the picture and the configuration."""
    job.watch.hyperparameters = _run_dir.flat(config)
    if job.watch.settings.pictures and not checkpoint.all_of(job.run_dir):
        job.watch.picture = pictures.load(save_views(job.loader, parts, job.watch.settings.pictures, job.run_dir))


def list_bad_images(job: Run) -> None:
    """Write which images could not be read since the start of this process."""
    if not job.loader.bad.count:
        return
    path = job.run_dir / ("bad_images.txt" if distributed.is_main() else f"bad_images.{distributed.rank()}.txt")
    with suppress(OSError):  # on a full disk; what ended the run is what counts
        job.loader.bad.write(path)
    job.screen.warn(f"{job.loader.bad.count} images could not be read: see {path}")


def build_loader(config: dict[str, Any], parts: Parts, device: torch.device) -> Loader:
    """The loader of a run."""
    return Loader(
        parts.source,
        parts.views,
        batch_size=config["train"]["batch_size"],
        accumulate=config["train"]["accumulate"],
        seed=config["seed"],
        device=device,
    )


def check_batch(loader: Loader, parts: Parts) -> None:
    """Raise ConfigError where a BatchNorm would see a single image."""
    if loader.part < 2 and any(isinstance(module, _BatchNorm) for module in parts.method.modules()):
        raise ConfigError(
            f"train.batch_size is {loader.batch_size}, which leaves 1 image to a micro-batch of a process, but "
            f"BatchNorm needs 2: choose at least {2 * loader.batch_size}"
        )


def check_cached_gradients(method: Method, wanted: bool) -> None:
    """Raise ConfigError where the gradient of the method's loss cannot be taken in two halves."""
    name = type(method).__name__
    if wanted and not method.in_batch:
        raise ConfigError(
            f"train.cached_gradients is true, but the loss of {name} does not compare the images of a batch, so "
            "train.accumulate alone gives its gradient: set train.cached_gradients=false"
        )
    if wanted and getattr(method, "mixture", None) is not None:
        raise ConfigError(
            "train.cached_gradients is true, but mixture mixes the images of a whole batch, which is never in memory "
            "then: choose one of them (mixture=null, or train.cached_gradients=false)"
        )


def assemble(
    config: dict[str, Any],
    parts: Parts,
    loader: Loader,
    optimizer: Optimizer,
    peak_lr: float,
    run_dir: Path,
    device: torch.device,
    screen: Screen,
) -> Run:
    """Everything a run is made of, the method in training mode and the generators at the run's seed."""
    settings, monitor = TrainSettings(**config["train"]), MonitorSettings(**config["monitor"])
    resolved = precision.resolve(settings.precision, device)
    watch = Watch(
        monitor,
        log_every=settings.log_every,
        batch_size=settings.batch_size,
        steps_per_epoch=loader.steps_per_epoch,
        run_dir=run_dir,
        screen=screen,
        probe=probe_of(parts, monitor, device, resolved, screen),
        draw=partial(draw_pictures, parts, monitor.pictures, device) if draws(parts, monitor) else None,
        together=sharding.is_sharded(parts.method),
    )
    if settings.compile:
        parts.method.backbone.compile()
    torch.manual_seed(config["seed"] + 1_000_003 * (distributed.rank() + 1))
    return Run(
        method=parts.method,
        optimizer=optimizer,
        loader=loader,
        settings=settings,
        peak_lr=peak_lr,
        seed=config["seed"],
        device=device,
        precision=resolved,
        run_dir=run_dir,
        config={key: value for key, value in config.items() if not key.startswith("_")},
        screen=screen,
        watch=watch,
        stop=StopRequest(seconds("train.max_time", settings.max_time), begun=launch.begun()),
    )


def set_determinism(wanted: bool, *, compiled: bool) -> None:
    """Prefer kernels that give the same result every time; a warning names those that cannot."""
    if compiled:  # tells the compiler as well, whose import takes seconds
        torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.set_deterministic_debug_mode("warn" if wanted else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not wanted


def probe_of(
    parts: Parts, monitor: MonitorSettings, device: torch.device, resolved: str, screen: Screen
) -> Callable[[], dict[str, float]] | None:
    """The online k-NN, or None, saying why, where it cannot be measured."""
    if monitor.knn_every == 0:
        return None
    if not parts.source.labelled or len(parts.source.splits["val"]) == 0:
        screen.say("k-NN is skipped: the images have no labels, or none are held out (dataset.val_fraction)")
        return None
    measure = knn_probe(parts.method, parts.source, parts.views, monitor, device=device, precision=resolved)

    def probe() -> dict[str, float]:
        with sharding.gathered(parts.method):
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
        sharding.gathered(parts.method),
        torch.no_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        found = parts.method.pictures(prepared)
    restore = partial(views.restore, mean=source.mean, std=source.std)
    return {name: pictures.grid([restore(row.float().cpu()) for row in rows]) for name, rows in found.items()}


def effective(job: Run, parts: Parts, config: dict[str, Any]) -> dict[str, Any]:
    """What the settings come to: learning rate after scaling, steps, negatives, images a step."""
    settings, node = job.settings, config["optimizer"]
    processes = distributed.world_size()
    trainable = sum(p.numel() for p in parts.method.parameters() if p.requires_grad)
    held = sum(distributed.local(p).numel() for p in parts.method.parameters())
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


def doubts(job: Run, parts: Parts) -> list[str]:
    """Settings that work and are seldom meant."""
    found = []
    queue = getattr(parts.method, "queue", None)
    num_images = len(parts.source.splits["train"])
    if isinstance(queue, torch.Tensor) and len(queue) > num_images:
        found.append(
            f"the queue holds {len(queue):,} keys but there are {num_images:,} images, so views of one image are "
            "negatives of each other: method.queue_size=4096 is usual for small sets, with method.momentum=0.99"
        )
    settings = job.settings
    if (
        settings.accumulate > 1
        and not settings.cached_gradients
        and job.method.effective(2).get("negatives a query sees") not in (None, 0)
    ):
        remedy = ": train.cached_gradients=true contrasts them all" if job.method.in_batch else ""
        found.append(f"with train.accumulate the negatives within a batch are those of the micro-batch alone{remedy}")
    return found


def outcome(run_dir: Path) -> str:
    """The last figures of a run, for the line that ends it."""
    found = newest(run_dir / "metrics.jsonl", "monitor/knn_top1")
    loss = newest(run_dir / "metrics.jsonl", "train/loss")
    parts = [f"loss {show(loss)}" if loss is not None else "", f"k-NN {percent(found)}" if found is not None else ""]
    told = ", ".join(part for part in parts if part)
    return f" ({told})" if told else ""
