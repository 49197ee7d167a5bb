"""One process of a training run: build everything, train, end with the right exit code."""

from __future__ import annotations

import gc
import os
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

import torch

from sslcli.config.own_dataset import FINGERPRINT
from sslcli.config.run_config import RunConfig
from sslcli.data.workers import worker_died_error
from sslcli.distributed import collectives, devices, processes, watchdog
from sslcli.engine import checkpoint
from sslcli.engine.loop import Run, train
from sslcli.errors import (
    DISK_ERRORS,
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_STOPPED,
    ConfigError,
    ProcessLost,
    Stopped,
    TrainingFailed,
    disk_failure,
    print_error,
)
from sslcli.report import pictures
from sslcli.report.console import Screen, percent, show
from sslcli.report.metrics import newest
from sslcli.report.terminal import log_and_print
from sslcli.runs import directory
from sslcli.runs.agreement import check_agreement
from sslcli.runs.assemble import (
    assemble,
    build_loader,
    check_batch,
    check_cached_gradients,
    effective,
    place,
    suspicious_settings,
)
from sslcli.runs.build import Parts, build_optimizer, build_parts
from sslcli.runs.dry_run import dry_run, save_views
from sslcli.runs.image_changes import check_images
from sslcli.system import atomic
from sslcli.system.memory import keep_freed_memory

WAIT = 2.0  # seconds, see _end
LOST_CONTACT = "another process of this run ended; start the same command again to go on"


def run(config: RunConfig) -> int:
    """Carry out a checked configuration in this process; the exit code."""
    run_dir = Path(str(config.run_dir))
    if processes.restarted():  # what is there is of this very command
        config = config.changed(resume="auto")
    threading.excepthook = _leave_to_the_main_thread
    try:
        if directory.is_finished(run_dir) and config.resume != "never" and not config.dry_run:
            directory.check_resumable(run_dir, config.values)
            Screen(silent=processes.number() > 0).say(f"this run is finished already: {run_dir}{outcome(run_dir)}")
            return 0
        directory.check_resumable(run_dir, config.values)
        device = devices.pick_device(config.device)
        keep_freed_memory()
        devices.share_threads(config.launcher.threads)
        devices.prepare(device, deterministic=config.train.deterministic, compiled=config.train.compile)
        limit = config.launcher.timeout_seconds
        with processes.process_group(device, limit=limit, end=partial(_end_a_hang, run_dir)):
            check_agreement(config.values)
            return _carry_out(config, run_dir, device)
    except ConfigError as error:
        return _end(error, EXIT_CONFIG)
    except ProcessLost as error:
        return _end(str(error), processes.exit_lost())
    except TrainingFailed as error:
        return _end(error, EXIT_FAILED)
    except Stopped as error:
        return EXIT_STOPPED if processes.number() > 0 else _end(str(error), EXIT_STOPPED)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # raised wherever the signal of the dying worker finds us
            return _end(str(worker_died_error(error)), processes.exit_lost())
        if processes.lost_contact(error):
            # The other process has the reason to tell, unless the network itself has.
            noticed = str(error).strip().splitlines()[0]
            return _end(f"{LOST_CONTACT} (noticed here: {noticed})", processes.exit_lost(), wait=2 * WAIT)
        raise
    except OSError as error:
        told = disk_failure(error, run_dir, "run_dir")
        if told is None:
            raise
        return _end(*told)


def _leave_to_the_main_thread(failure: threading.ExceptHookArgs) -> None:
    """Say nothing of a full disk that TensorBoard's thread found: the next thing to be written raises it again."""
    if not isinstance(failure.exc_value, OSError) or failure.exc_value.errno not in DISK_ERRORS:
        threading.__excepthook__(failure)


def _end(message: BaseException | str, code: int, *, wait: float | None = None) -> int:
    """Tell why this process ends; the exit code.

    What ends all processes is told once: the main one is first, and its launcher ends the others while they wait.
    """
    time.sleep((WAIT if processes.number() > 0 else 0.0) if wait is None else wait)
    print_error("train", message)
    return code


def _end_a_hang(run_dir: Path, message: str) -> None:
    """End this process from the thread that watches it; one process has the message, which goes first."""
    if message:
        log_and_print(run_dir, message)
    else:
        time.sleep(WAIT)
    os._exit(EXIT_FAILED)


def _carry_out(config: RunConfig, run_dir: Path, device: torch.device) -> int:
    main, dry = collectives.is_main(), config.dry_run
    parts = build_parts(config)
    loader = build_loader(config, parts, device)
    check_batch(loader, parts)
    check_cached_gradients(parts.method, config.train.cached_gradients)
    place(parts.method, config.train, device)
    optimizer, peak_lr = build_optimizer(config, parts.method)
    held = hold(run_dir, patience=patience_of(config)) if main and not dry else None
    if held is not None:
        directory.check_resumable(run_dir, config.values)  # once more, now that nobody else can change it
    with Screen(None if dry else run_dir / "console.log", silent=not main) as screen:
        check_images(run_dir, parts.source, screen, write=not dry)
        job = assemble(config, parts, loader, optimizer, peak_lr, run_dir, device, screen)
        try:
            facts = effective(job, parts, config)
            screen.table(f"{config.method['_target_'].rpartition('.')[2]}: {run_dir}", facts)
            for warning in suspicious_settings(job, parts):
                screen.warn(warning)
            if dry:
                job.stop.close()  # an interrupt ends it at once
                return dry_run(job, parts)
            if main:
                facts |= {FINGERPRINT: parts.source.fingerprint}
                directory.describe(
                    run_dir,
                    config.values,
                    overrides=config.overrides,
                    effective=facts,
                    device=str(device),
                    threads=torch.get_num_threads(),
                )
                prepare_monitor(job, parts, config)
            end_start()
            train(job)
        except Stopped as error:
            screen.write(str(error))
            if error.by_signal and config.launcher.kind == "slurm":
                want_requeue(run_dir, error)
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
    if held is not None:
        held.close()
    return 0


def end_start() -> None:
    """Collect garbage from here on, where `launch` put that off, but only among what is made from here on.

    What the imports left is a million objects; to search them is most of the time that a process takes to end.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def patience_of(config: RunConfig) -> float:
    """Seconds to wait for the run directory.

    When Slurm starts a job again because a node is lost, the processes on that node hold the directory until they
    notice, which takes `launcher.timeout` at most.
    """
    return 0.0 if int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0 else config.launcher.timeout_seconds + 60


def hold(run_dir: Path, *, patience: float) -> IO[str]:
    """Lock the run directory. Raises ConfigError where another run holds it for longer than `patience`, in seconds."""
    begun = time.monotonic()
    while True:
        try:
            return directory.lock(run_dir)
        except ConfigError:
            if time.monotonic() - begun > patience:
                raise
            watchdog.report_progress("waiting for the run directory")


def want_requeue(run_dir: Path, why: Stopped) -> None:
    """Leave word for the job's script that the run is saved and wants to go on; no process ends before."""
    if collectives.is_main():
        atomic.replace(run_dir / "slurm" / "want_requeue", str(why).partition(";")[0].encode())
    collectives.barrier()


def prepare_monitor(job: Run, parts: Parts, config: RunConfig) -> None:
    """At the start of a run, draw its views; give TensorBoard the picture and the configuration."""
    job.monitor.hyperparameters = directory.flat(config.values)
    if job.monitor.settings.pictures and not checkpoint.all_of(job.run_dir):
        job.monitor.picture = pictures.load(save_views(job.loader, parts, job.monitor.settings.pictures, job.run_dir))


def list_bad_images(job: Run) -> None:
    """Write which images could not be read since the start of this process."""
    if not job.loader.bad.count:
        return
    path = job.run_dir / ("bad_images.txt" if collectives.is_main() else f"bad_images.{collectives.rank()}.txt")
    with suppress(OSError):  # on a full disk; what ended the run is what counts
        job.loader.bad.write(path)
    job.screen.warn(f"{job.loader.bad.count} images could not be read: see {path}")


def outcome(run_dir: Path) -> str:
    """The last figures of a run, for the line that ends it."""
    found = newest(run_dir / "metrics.jsonl", "monitor/knn_top1")
    loss = newest(run_dir / "metrics.jsonl", "train/loss")
    parts = [f"loss {show(loss)}" if loss is not None else "", f"k-NN {percent(found)}" if found is not None else ""]
    told = ", ".join(part for part in parts if part)
    return f" ({told})" if told else ""
