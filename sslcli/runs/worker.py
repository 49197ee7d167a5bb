"""One process of a training run: setup, training and exit codes."""

from __future__ import annotations

import gc
import os
import threading
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch.optim import Optimizer

from sslcli.config.comparison import flatten
from sslcli.config.own_dataset import FINGERPRINT
from sslcli.config.run_config import RunConfig
from sslcli.data import worker_server
from sslcli.data.loader import Loader
from sslcli.distributed import collectives, devices, processes, watchdog
from sslcli.engine import checkpoint, precision
from sslcli.engine.loop import train
from sslcli.engine.resume import resume
from sslcli.engine.run import Run
from sslcli.errors import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_STOPPED,
    ConfigError,
    ProcessLost,
    Stopped,
    TrainingFailed,
    disk_failure,
    is_out_of_memory,
    user_code,
)
from sslcli.report import pictures
from sslcli.report.console import Screen, percent, show
from sslcli.report.metrics import newest
from sslcli.runs import directory
from sslcli.runs.agreement import check_agreement
from sslcli.runs.assemble import (
    assemble,
    build_loader,
    check_batch,
    check_cached_gradients,
    move_to_device,
    startup_table,
    suspicious_settings,
)
from sslcli.runs.batch_size_search import configured, find_batch_size
from sslcli.runs.build import build_optimizer
from sslcli.runs.description import write_description
from sslcli.runs.dry_run import dry_run, save_views
from sslcli.runs.failures import (
    WAIT,
    LostContact,
    deletion,
    end_process,
    end_stalled_process,
    has_own_message,
    ignore_disk_error,
    with_message,
)
from sslcli.runs.image_changes import check_images
from sslcli.runs.initial_weights import InitialWeights, check_start, initial_weights, record_of
from sslcli.runs.length import phase_rows, planned_phases
from sslcli.runs.moved_images import check_moved, earlier_moved, moved_row, possibly_moved
from sslcli.runs.out_of_memory import explained
from sslcli.runs.parts import Parts, build_parts
from sslcli.runs.shorter_run import shorter_run_hint
from sslcli.runs.teacher import check_teacher, teacher_row
from sslcli.runs.trial import Trial, freeze, trial, trial_warnings
from sslcli.system import atomic
from sslcli.system.memory import keep_freed_memory


def run(config: RunConfig) -> int:
    """Run ssl-train with a validated configuration in this process, and return the exit code."""
    threading.excepthook = ignore_disk_error
    try:
        execute(config)
        return 0
    except ConfigError as error:
        return end_process(error, EXIT_CONFIG)
    except LostContact as error:
        return end_process(str(error), processes.exit_lost(), wait=2 * WAIT)
    except ProcessLost as error:
        return end_process(str(error), processes.exit_lost())
    except TrainingFailed as error:
        return end_process(error, EXIT_FAILED)
    except Stopped as error:
        return EXIT_STOPPED if processes.number() > 0 else end_process(str(error), EXIT_STOPPED)


def execute(config: RunConfig) -> None:
    """Train in this process.

    Raises ConfigError, TrainingFailed or Stopped if the run cannot start or ends early. Their messages are for users.
    """
    run_dir = config.directory
    if processes.restarted():  # an earlier attempt of this command has already started the run
        config = config.changed(resume="auto")
    try:
        if config.resume != "never" and not config.dry_run and directory.is_complete(run_dir, config.values):
            directory.check_resumable(run_dir, config.values)
            Screen(silent=processes.number() > 0).say(f"this run is finished already: {run_dir}{outcome(run_dir)}")
            return
        directory.check_resumable(run_dir, config.values)
        device = devices.pick_device(config.device)
        if config.find_batch_size:
            config = configured(config, device)
        keep_freed_memory()
        devices.set_threads(config.launcher.threads)
        deterministic = devices.uses_deterministic_kernels(config.train.deterministic, device)
        worker_server.start(device)
        devices.prepare(device, deterministic=deterministic)
        limit = config.launcher.timeout_seconds
        with processes.process_group(device, limit=limit, end=partial(end_stalled_process, run_dir)):
            check_agreement(config.values)
            with user_code("preparing the run", passes=partial(has_own_message, run_dir)):
                _train(config, run_dir, device)
    except TrainingFailed:
        raise
    except (RuntimeError, MemoryError) as error:
        found = with_message(error, config)
        if found is error:
            raise
        raise found from error
    except OSError as error:
        failure = disk_failure(error, run_dir, "run_dir") or deletion(error, run_dir)
        if failure is None:
            raise
        message, code = failure
        raise (ConfigError(message) if code == EXIT_CONFIG else TrainingFailed(message)) from error


def _train(config: RunConfig, run_dir: Path, device: torch.device) -> None:
    main, dry = collectives.is_main(), config.dry_run
    initial = initial_weights(config)
    parts = build_parts(config, initialize=None if initial is None else initial.load)
    if initial is not None:
        initial.check_kept(parts.method)
    loader = build_loader(config, parts, device)
    check_batch(loader, parts)
    check_cached_gradients(parts.method, config.train.cached_gradients)
    with explained(config, parts.method, device):
        found = run_trial(config, loader, parts, device)
        move_to_device(parts.method, config.train, device)
    optimizer, peak_lr = build_optimizer(config, parts.method)
    if collectives.world_size() > 1:
        # Freeze after the optimizer was built, so that the optimizer has the same parameters as with one process.
        freeze(parts.method, found.unused)
    with acquire_lock(run_dir, patience=lock_patience(config)) if main and not dry else nullcontext():
        if main and not dry:
            # Check again, since now no other process can change the directory.
            directory.check_resumable(run_dir, config.values)
        _train_locked(config, parts, loader, optimizer, peak_lr, found, initial)


def _train_locked(
    config: RunConfig,
    parts: Parts,
    loader: Loader,
    optimizer: Optimizer,
    peak_lr: float,
    found: Trial,
    initial: InitialWeights | None,
) -> None:
    """Train after the run directory was locked. `found` is the result of the trial."""
    main, dry, run_dir, device = collectives.is_main(), config.dry_run, config.directory, loader.device
    with Screen(None if dry else run_dir / "console.log", silent=not main) as screen:
        stored = directory.read_config(run_dir) if (run_dir / "config.yaml").exists() else {}
        check_teacher(parts.teacher, stored, run_dir)
        moved = check_dataset(config, stored, parts, screen)
        phases = planned_phases(run_dir, stored, config.values)
        job = assemble(config, parts, loader, optimizer, peak_lr, run_dir, device, screen, phases=phases, moved=moved)
        try:
            facts = startup_table(job, parts, config)
            screen.table(f"{config.method['_target_'].rpartition('.')[2]}: {run_dir}", facts)
            if initial is not None:
                initial.report(parts.source, parts.views, screen)
            if parts.teacher is not None:
                screen.say(f"teacher: {parts.teacher.summary}")
            for warning in trial_warnings(found, parts.method, config.monitor):
                screen.warn(warning)
            for warning in suspicious_settings(job, parts):
                screen.warn(warning)
            if main and (hint := shorter_run_hint(config)):
                screen.say(hint)
            with explained(config, parts.method, device, optimizer):
                if dry:
                    job.stop.close()  # then an interrupt ends the dry run immediately
                    find_batch_size(job) if config.find_batch_size else dry_run(job, parts)
                    return
                # Resume before config.yaml is written, so that it stays unchanged if the checkpoint is refused.
                step = resume(job)
                check_start(config, initial, step)
                if main:
                    records = moved_row(moved) | record_of(initial, stored) | teacher_row(parts.teacher)
                    describe(job, parts, config, facts | records)
                enable_garbage_collection()
                with user_code("training", passes=partial(has_own_message, run_dir)):
                    train(job, step)
        except Stopped as error:
            screen.write(str(error))
            if error.by_signal and config.launcher.kind == "slurm":
                request_requeue(run_dir, error)
            raise
        except (ConfigError, TrainingFailed) as error:
            screen.write(str(error))
            raise
        finally:
            job.stop.close()
            job.monitor.close()
            if not dry:
                list_bad_images(job)
        if main:
            atomic.replace(run_dir / "done", b"")
        screen.say(f"done: {run_dir}{outcome(run_dir)}")


def run_trial(config: RunConfig, loader: Loader, parts: Parts, device: torch.device) -> Trial:
    """Compute the loss once before the first step, and return the result (see `Trial`).

    A sharded method may be too large for one device, so its trial runs on the CPU. If the main memory is too small for
    this, there is no trial.
    """
    if config.train.sharding != "fsdp":
        return trial(loader, parts.method, device, precision.resolve(config.train.precision, device))
    place = torch.device("cpu")
    try:
        return trial(loader, parts.method, place, precision.resolve(config.train.precision, place))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Trial()


def check_dataset(config: RunConfig, stored: dict[str, Any], parts: Parts, screen: Screen) -> tuple[str, ...]:
    """Compare the current images with the images of earlier starts of the run.

    The comparison is described in `check_moved` and `check_images`.

    `stored` is the content of `config.yaml`, or {} for a new run.

    Return the names of the dataset settings, such as `root`, whose paths have changed since the run was first started.
    Raises ConfigError on all processes if the images differ.
    """
    run_dir = config.directory
    check_moved(run_dir, stored, config.values, parts.source, screen)
    check_images(run_dir, parts.source, screen, write=not config.dry_run)
    return (*earlier_moved(stored), *possibly_moved(stored, config.values))


def enable_garbage_collection() -> None:
    """Enable garbage collection if `launch` disabled it, but exclude the objects that already exist.

    Imports create about a million objects. Unless they are excluded, scanning them takes most of the time that a
    process needs to exit.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def lock_patience(config: RunConfig) -> float:
    """Return the maximum wait for the lock of the run directory, in seconds.

    The wait is 0 unless Slurm has restarted the job. If Slurm loses contact with a node, it restarts the job. Processes
    on the lost node may still run and hold the lock. They detect the lost connection, and exit after at most
    `launcher.timeout`. Therefore the wait after a restart is `launcher.timeout` plus one minute.
    """
    return 0.0 if int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0 else config.launcher.timeout_seconds + 60


def acquire_lock(run_dir: Path, *, patience: float) -> IO[str]:
    """Lock the run directory. Raises ConfigError if another process keeps the lock for more than `patience` seconds."""
    start = time.monotonic()
    while True:
        try:
            return directory.lock(run_dir)
        except ConfigError:
            if time.monotonic() - start > patience:
                raise
            watchdog.report_progress("waiting for the run directory")


def request_requeue(run_dir: Path, why: Stopped) -> None:
    """Write the file `want_requeue`, so that the batch script requeues the job.

    The checkpoint must already be saved. This is a collective operation: all processes must call it. `why` is the
    exception that ended the training. The file contains the first part of its message, the reason.
    """
    if collectives.is_main():
        atomic.replace(run_dir / "slurm" / "want_requeue", str(why).partition(";")[0].encode())
    collectives.barrier()


def describe(job: Run, parts: Parts, config: RunConfig, facts: dict[str, Any]) -> None:
    """Write the files that describe the run, and pass the configuration to the monitor.

    `facts` is the startup table.
    """
    write_description(
        job.run_dir,
        config.values,
        overrides=config.overrides,
        effective=facts | {FINGERPRINT: parts.source.fingerprint, **phase_rows(job.phases)},
        execution={
            "device": str(job.device),
            "threads": torch.get_num_threads(),
            "deterministic_kernels": torch.are_deterministic_algorithms_enabled(),
            "compiled": job.compiled,
        },
        warn=job.screen.warn,
    )
    prepare_monitor(job, parts, config)


def prepare_monitor(job: Run, parts: Parts, config: RunConfig) -> None:
    """Pass the configuration to the monitor, which writes it to TensorBoard.

    If the run has no checkpoint yet and `monitor.pictures` is above 0, also save a picture that shows views of some
    images, and pass it to the monitor.
    """
    job.monitor.hyperparameters = flatten(config.values)
    if job.monitor.settings.pictures and not checkpoint.all_of(job.run_dir):
        job.monitor.picture = pictures.load(save_views(job.loader, parts, job.monitor.settings.pictures, job.run_dir))


def list_bad_images(job: Run) -> None:
    """Write the list of images that this process could not read, and print a warning with its path."""
    if not job.loader.bad.count:
        return
    path = job.run_dir / ("bad_images.txt" if collectives.is_main() else f"bad_images.{collectives.rank()}.txt")
    with suppress(OSError):  # a full disk must not hide the error that ended the run
        job.loader.bad.write(path)
    job.screen.warn(f"{job.loader.bad.count} images could not be read: see {path}")


def outcome(run_dir: Path) -> str:
    """Return the last loss and k-NN accuracy of a run in parentheses, or "" if the run has neither."""
    found = newest(run_dir / "metrics.jsonl", "monitor/knn_top1")
    loss = newest(run_dir / "metrics.jsonl", "train/loss")
    parts = [f"loss {show(loss)}" if loss is not None else "", f"k-NN {percent(found)}" if found is not None else ""]
    numbers = ", ".join(part for part in parts if part)
    return f" ({numbers})" if numbers else ""
