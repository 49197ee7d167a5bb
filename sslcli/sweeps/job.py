"""Jobs of a sweep: command lines, statuses and records. The records on disk remain after the sweep exits."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from sslcli.config.moved import old_override
from sslcli.config.paths import absolute
from sslcli.config.settings import SweepSettings
from sslcli.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from sslcli.runs import directory
from sslcli.runs.identity import default_name
from sslcli.runs.slurm.queue import recorded_exit_code, submitted_job
from sslcli.system import atomic
from sslcli.system.child_processes import signal_with_parent
from sslcli.system.locks import can_lock, lock
from sslcli.system.stored import read_json

PARENT = "SSLCLI_SWEEP"  # environment variable of a job: process ID of the sweep that started the job
PROC = Path("/proc")  # exists only on Linux
WAITING, SUBMITTED, RUNNING, CHECKED = "waiting", "submitted", "running", "checked"
FINISHED, STOPPED, INTERRUPTED, FAILED = "finished", "stopped", "interrupted", "failed"


@dataclass(frozen=True)
class Sweep:
    """Settings that all jobs of a sweep have in common. Instances are picklable, to be sent to other processes."""

    command: str  # train or eval
    program: tuple[str, ...]  # beginning of the command line of a job
    folder: Path  # absolute
    settings: SweepSettings
    flags: tuple[str, ...]  # flags for every job, such as --config-dir=...
    shared: tuple[str, ...]  # overrides of all jobs
    submits: bool = False  # True if a job's process only submits its run to Slurm

    @property
    def records(self) -> Path:
        """Folder of the job records and logs."""
        return self.folder / "jobs"

    @property
    def metric(self) -> str | None:
        """Metric that ranks the jobs. It is None for ssl-eval, because jobs of ssl-eval have no metrics.jsonl."""
        return None if self.command == "eval" else self.settings.metric

    def title(self, job: Job) -> str:
        """Return the display name of a job: the overrides that differ between the jobs."""
        return " ".join(line for line in job.overrides if line not in self.shared) or "defaults"


@dataclass(frozen=True)
class Job:
    """One job of a sweep: one combination of the swept values."""

    name: str  # name of the record, and of the run directory if run_dir is not set
    overrides: tuple[str, ...]  # as on the command line
    run_dir: Path | None  # None for a job of ssl-eval


@dataclass(frozen=True, kw_only=True)
class Record:
    """Record of a job on disk. The record remains after the sweep exits."""

    overrides: list[str]
    run_dir: str | None  # relative to the sweep's folder if it is inside that folder
    started: str | None = None
    host: str | None = None
    process: int | None = None
    code: int | None = None  # exit code; -N means that signal N ended the process


def job_of(sweep: Sweep, config: dict[str, Any]) -> Job:
    """Return the `Job` for a validated configuration that was composed from the overrides of one job."""
    overrides = tuple(line for line in config["_lines_"] if not is_sweep_setting(line))
    if sweep.command == "eval":
        return Job(
            hashlib.sha256("\n".join(map(old_override, overrides)).encode("utf-8", "surrogatepass")).hexdigest()[:8],
            overrides,
            None,
        )
    name, given = default_name(config["_choices_"], config["_overrides_"]), config["_run_dir_"]
    if given is None:
        return Job(name, overrides, sweep.folder / name)
    digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return Job(f"{name}_{digest}", overrides, Path(absolute(given)))


def is_sweep_setting(line: str) -> bool:
    """Return True if an override applies to the sweep and not to its jobs.

    The overrides of the sweep are all `sweep.*`, and all `hydra.*` except `hydra.searchpath`.
    """
    key = line.partition("=")[0].lstrip("+~")
    return key.startswith(("sweep.", "hydra.", "hydra/")) and key != "hydra.searchpath"


def command_line(sweep: Sweep, job: Job) -> list[str]:
    """Return the command line of a job."""
    line = [*sweep.program, *sweep.flags, *job.overrides]
    if job.run_dir is not None and not any(override.startswith("run_dir=") for override in job.overrides):
        quoted = str(job.run_dir).replace("\\", "\\\\").replace('"', '\\"')
        line.append(f'run_dir="{quoted}"')
    return line


def log_of(sweep: Sweep, job: Job) -> Path:
    """Return the log file of a job. If several jobs run in parallel, each job prints into its log file."""
    return sweep.records / f"{job.name}.log"


def read_or_create_record(sweep: Sweep, job: Job) -> Record:
    """Return the record of a job. Create the record if it does not exist."""
    path = sweep.records / f"{job.name}.json"
    if path.exists():
        return read(path)
    run_dir = job.run_dir
    if run_dir is not None and run_dir.is_relative_to(sweep.folder):
        run_dir = run_dir.relative_to(sweep.folder)
    record = Record(overrides=list(job.overrides), run_dir=None if run_dir is None else str(run_dir))
    write(path, record)
    return record


def record_start(sweep: Sweep, job: Job, process: int) -> None:
    """Record the start of a job, with its process ID on this machine."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    changes: dict[str, Any] = {"started": now, "host": platform.node(), "process": process, "code": None}
    write(sweep.records / f"{job.name}.json", replace(read_or_create_record(sweep, job), **changes))


def record_end(sweep: Sweep, job: Job, code: int) -> None:
    """Record the exit code of a job."""
    write(sweep.records / f"{job.name}.json", replace(read_or_create_record(sweep, job), process=None, code=code))


def read(path: Path) -> Record:
    """Read a record. Raises DamagedFile if the file is not the record of a job."""
    return read_json(path, Record, remedy="remove it, or choose another hydra.sweep.dir")


def write(path: Path, record: Record) -> None:
    """Write a record atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace(path, json.dumps(asdict(record), indent=2).encode())


def status_of(sweep: Sweep, name: str, record: Record, *, is_claimed: bool = False) -> str:
    """Return the status of a job.

    The status depends first on whether the run in the run directory is finished, then on whether a process runs the
    job, and last on the exit code in the record.

    Args:
        sweep: sweep of the job.
        name: name of the job.
        record: record of the job.
        is_claimed: True if this process holds the lock of the job, so that no other process runs the job.
    """
    folder = sweep.folder
    run_dir = None if record.run_dir is None else folder / record.run_dir
    if run_dir is not None and directory.is_finished(run_dir):
        return FINISHED
    if not is_claimed and is_running(sweep, name, record):
        return RUNNING
    code = code_of(folder, record)
    if code is None:
        return INTERRUPTED if record.started else WAITING
    if code == 0 and run_dir is not None:
        return CHECKED if submitted_job(run_dir) is None else SUBMITTED
    if code == 0:
        return FINISHED
    if code == EXIT_STOPPED:
        return STOPPED
    return INTERRUPTED if code < 0 or code == EXIT_INTERRUPTED else FAILED


def code_of(folder: Path, record: Record) -> int | None:
    """Return the exit code of a job of the sweep in `folder`.

    If the job submitted a Slurm job, return the exit code of the Slurm job.
    """
    if record.code == 0 and record.run_dir is not None:
        return recorded_exit_code(folder / record.run_dir) or 0
    return record.code


def is_running(sweep: Sweep, name: str, record: Record) -> bool:
    """Return True if any process runs the job.

    The process may have been started by another sweep, by a sweep that was killed, or by the user.
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

    The lock is held until the lock file and its copies in child processes are closed. This function can lock a job
    whose run trains on Slurm. The process of such a job checks whether the Slurm job is still queued or running.
    """
    file = lock(lock_path(sweep, job.name))
    if file is None:
        return None
    is_submitted = sweep.submits and job.run_dir is not None and submitted_job(job.run_dir) is not None
    busy = job.run_dir is not None and not is_submitted and directory.is_locked(job.run_dir)
    if busy or (not can_lock(sweep.records) and _is_alive(read_or_create_record(sweep, job))):
        file.close()
        return None
    return file


def lock_path(sweep: Sweep, name: str) -> Path:
    """Return the lock file of a job.

    The sweep and the process of the job share the lock. The lock is held until both have ended.
    """
    return sweep.records / f"{name}.lock"


def describe_runner(sweep: Sweep, job: Job) -> str:
    """Return a phrase that names the process that runs a job, for messages."""
    if job.run_dir is not None and directory.is_locked(job.run_dir):
        owner = (job.run_dir / ".lock").read_text(encoding="utf-8", errors="replace").strip()
        if owner:
            return owner
    record = read_or_create_record(sweep, job)
    return "another process" if record.process is None else f"process {record.process} on {record.host}"


def _is_alive(record: Record) -> bool:
    """Return True if the process of a job still runs on this machine.

    Return False if another process has the same ID now.
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
        is_claimed: see `status_of`.
    """
    status = status_of(sweep, job.name, read_or_create_record(sweep, job), is_claimed=is_claimed)
    if status == FINISHED:
        return sweep.command == "eval"
    return status != FAILED or sweep.settings.retry_failed


def stop_with_sweep() -> None:
    """If a sweep started this process, let the kernel send SIGTERM to this process when the sweep ends (Linux only).

    This works even if SIGKILL ends the sweep. A run that receives SIGTERM saves a checkpoint and stops.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        signal_with_parent(int(parent), signal.SIGTERM)
