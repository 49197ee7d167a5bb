"""Status of the jobs of a sweep, and locks that prevent several processes from running the same job."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any

from sslcli.config.comparison import digest_of_settings
from sslcli.errors import EXIT_INTERRUPTED, EXIT_STOPPED, ConfigError
from sslcli.runs import directory
from sslcli.runs.length import stored_phases
from sslcli.runs.slurm.queue import recorded_exit_code, slurm_dir, submitted_job
from sslcli.sweeps.job import Job, Record, Sweep, read, read_or_create_record, record_path, settings_of, source_of
from sslcli.system import atomic
from sslcli.system.locks import can_lock, lock

PROC = Path("/proc")  # exists only on Linux
WAITING, SUBMITTED, RUNNING, CHECKED = "waiting", "submitted", "running", "checked"
FINISHED, STOPPED, INTERRUPTED, FAILED = "finished", "stopped", "interrupted", "failed"


def status_of(sweep: Sweep, name: str, record: Record, *, is_claimed: bool = False) -> str:
    """Return the status of a job.

    The status is "finished" if the run in the run directory is finished. Otherwise, it is "running" if a process runs
    the job. Otherwise, the exit code in the record determines the status. If there is no exit code, the status is
    "interrupted" if the job was started, and "waiting" if it was not.

    Args:
        sweep: sweep of the job.
        name: name of the job.
        record: record of the job on disk.
        is_claimed: True if this process holds the lock of the job, so that no other process runs the job.
    """
    folder = sweep.folder
    run_dir = None if record.run_dir is None else folder / record.run_dir
    if run_dir is not None and is_complete(run_dir, record):
        return FINISHED
    if not is_claimed and is_running(sweep, name, record):
        return RUNNING
    code = code_of(folder, record)
    if code is None:
        return INTERRUPTED if record.started else WAITING
    if code == 0 and run_dir is not None:
        if directory.is_finished(run_dir):  # it was trained with fewer epochs or steps than the job has now
            return STOPPED
        return CHECKED if submitted_job(slurm_dir(run_dir)) is None else SUBMITTED
    if code == 0:
        return FINISHED
    if code == EXIT_STOPPED:
        return STOPPED
    return INTERRUPTED if code < 0 or code == EXIT_INTERRUPTED else FAILED


def is_finished(sweep: Sweep, job: Job) -> bool:
    """Return True if the run of a job has been trained to the number of steps in the current settings of the job."""
    record = replace(read_or_create_record(sweep, job), **settings_of(job))
    return job.run_dir is not None and is_complete(job.run_dir, record)


def is_complete(run_dir: Path, record: Record) -> bool:
    """Return True if the run in `run_dir` has been trained to the number of steps that `record` requires.

    This number of steps is computed from the number of epochs in `record`. A record of version 0.2 contains no number
    of epochs. For such a record, return True if the run is finished.
    """
    path = run_dir / "config.yaml"
    if record.epochs is None or not path.exists():
        return directory.is_finished(run_dir)
    try:
        config = _config(run_dir, _version(path))
    except ConfigError:  # the process of the job reports the error
        return directory.is_finished(run_dir)
    train = {"epochs": record.epochs, "max_steps": record.max_steps, "extend": record.extend}
    return directory.is_complete(run_dir, {"train": train}, config)


@cache
def _config(run_dir: Path, _: tuple[int, int, int]) -> dict[str, Any]:
    """Return the `config.yaml` of a run.

    Results are cached. The second argument is the version of the file. It is not used, but it is part of the cache key:
    a changed file has another version and is read again.
    """
    return directory.read_config(run_dir)


def _version(path: Path) -> tuple[int, int, int]:
    """Return three values that identify the version of a file: inode, size and modification time.

    At least one of them changes when the file is written again, even within one tick of the clock.
    """
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def stored_digest(run_dir: Path) -> str | None:
    """Return the digest of the settings in the `config.yaml` of a run, or None if the run was extended.

    A run is extended if it is resumed with more epochs or steps. An extended run may have other results than a run that
    had the same length from the beginning. The result is also None if the file cannot be read.
    """
    path = run_dir / "config.yaml"
    try:
        config = _config(run_dir, _version(path))
        return digest_of_settings(config) if len(stored_phases(config)) == 1 else None
    except (OSError, ConfigError):
        return None


def code_of(folder: Path, record: Record) -> int | None:
    """Return the exit code of a job of the sweep in `folder`, or None if the job has not ended.

    If the process of the job submitted a Slurm job, return the exit code of the Slurm job.
    """
    if record.code == 0 and record.run_dir is not None:
        return recorded_exit_code(slurm_dir(folder / record.run_dir)) or 0
    return record.code


def is_running(sweep: Sweep, name: str, record: Record) -> bool:
    """Return True if any process runs the job `name`.

    The process may have been started by this or another sweep, by a sweep that was killed, or by the user. `record` is
    the record of the job on disk.
    """
    if record.run_dir is not None and directory.is_locked(sweep.folder / record.run_dir):
        return True
    file = lock(lock_path(sweep, name))
    if file is None:
        return True
    file.close()
    return not can_lock(sweep.records) and _is_alive(record)


def claim_job(sweep: Sweep, job: Job) -> IO[str] | None:
    """Lock a job, so that no other process runs it. Return the lock file, or None if another process runs the job.

    The lock is held until the lock file and its copies in child processes are closed.

    With launcher=slurm, the process of a job only submits a Slurm job and then ends. The job can then be locked again
    while the Slurm job is queued or running. The next process of the job finds the Slurm job, and does not submit
    another one.
    """
    file = lock(lock_path(sweep, job.name))
    if file is None:
        return None
    is_submitted = sweep.submits and job.run_dir is not None and submitted_job(slurm_dir(job.run_dir)) is not None
    busy = job.run_dir is not None and not is_submitted and directory.is_locked(job.run_dir)
    if busy or (not can_lock(sweep.records) and _is_alive(read_or_create_record(sweep, job))):
        file.close()
        return None
    return file


def lock_path(sweep: Sweep, name: str) -> Path:
    """Return the lock file of the job `name`.

    The process of the sweep and the process of the job share the lock. The lock is held until both processes have
    ended. If a job belongs to several sweeps, all of these sweeps use the same lock file.
    """
    path = record_path(sweep, name)
    source = source_of(sweep, read(path)) if path.exists() else None
    return (source or path).with_suffix(".lock")


def describe_runner(sweep: Sweep, job: Job) -> str:
    """Return a phrase that describes the process that runs a job, for messages."""
    if job.run_dir is not None and directory.is_locked(job.run_dir):
        owner = (job.run_dir / ".lock").read_text(encoding="utf-8", errors="replace").strip()
        if owner:
            return owner
    record = read_or_create_record(sweep, job)
    return "another process" if record.process is None else f"process {record.process} on {record.host}"


def _is_alive(record: Record) -> bool:
    """Return True if the process in the record of a job still runs on this machine.

    If the process has ended and another process has the same ID now, return False.
    """
    if record.process is None or record.host != platform.node() or not atomic.is_alive(record.process):
        return False
    try:
        line = (PROC / str(record.process) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return not PROC.exists()
    return all(override.encode("utf-8", "surrogateescape") in line for override in record.overrides)


def is_due(sweep: Sweep, job: Job, *, is_claimed: bool = False) -> bool:
    """Return True if the sweep must start, resume or wait for a job.

    Args:
        sweep: sweep of the job.
        job: job to check.
        is_claimed: True if this process holds the lock of the job, so that no other process runs the job.
    """
    status = status_of(sweep, job.name, read_or_create_record(sweep, job), is_claimed=is_claimed)
    if status == FINISHED:
        return sweep.command == "eval"
    return status != FAILED or sweep.settings.retry_failed
