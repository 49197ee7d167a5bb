"""One job of a sweep: its command, how it stands, and the record of it that outlives the sweep."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from sslcli.config.moved import first_override
from sslcli.config.paths import absolute
from sslcli.config.settings import SweepSettings
from sslcli.errors import EXIT_INTERRUPTED, EXIT_STOPPED, ConfigError
from sslcli.runs import directory
from sslcli.runs.identity import default_name
from sslcli.runs.slurm.queue import recorded_exit_code, submitted_job
from sslcli.system import atomic
from sslcli.system.locks import can_lock, lock

PARENT = "SSLCLI_SWEEP"  # where a sweep leaves the id of its process for the jobs it starts
PROC = Path("/proc")  # not on every system
WAITING, SUBMITTED, RUNNING, CHECKED = "waiting", "submitted", "running", "checked"
FINISHED, STOPPED, INTERRUPTED, FAILED = "finished", "stopped", "interrupted", "failed"


@dataclass(frozen=True)
class Sweep:
    """What the jobs of a sweep have in common. Plain values, so that it travels to other processes and nodes."""

    command: str  # train or eval
    program: tuple[str, ...]  # that a job's line begins with
    folder: Path  # absolute
    settings: SweepSettings
    flags: tuple[str, ...]  # that every job needs, as --config-dir=...
    shared: tuple[str, ...]  # overrides of all jobs
    submits: bool = False  # a job's process hands the run to Slurm and does not train itself

    @property
    def records(self) -> Path:
        """The folder of records and of what jobs printed."""
        return self.folder / "jobs"

    @property
    def metric(self) -> str | None:
        """What ranks the jobs; those of ssl-eval have no metrics."""
        return None if self.command == "eval" else self.settings.metric

    def title(self, job: Job) -> str:
        """What a job is called on the screen: the overrides that not all share."""
        return " ".join(line for line in job.overrides if line not in self.shared) or "defaults"


@dataclass(frozen=True)
class Job:
    """One point of a sweep."""

    name: str  # of its record, and of its run directory unless run_dir is given
    overrides: tuple[str, ...]  # as a command line writes them
    run_dir: Path | None  # None: a job of ssl-eval


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a job after the sweep that started it is gone."""

    overrides: list[str]
    run_dir: str | None  # relative to the sweep's folder where it lies in there
    started: str | None = None
    host: str | None = None
    process: int | None = None
    code: int | None = None  # exit code, minus the number of the signal that ended it


def job_of(sweep: Sweep, config: dict[str, Any]) -> Job:
    """The job that a checked configuration, composed from the overrides of one point, stands for."""
    overrides = tuple(line for line in config["_lines_"] if not of_the_sweep(line))
    if sweep.command == "eval":
        return Job(hashlib.sha256("\n".join(map(first_override, overrides)).encode()).hexdigest()[:8], overrides, None)
    name, given = default_name(config["_choices_"], config["_overrides_"]), config["_run_dir_"]
    if given is None:
        return Job(name, overrides, sweep.folder / name)
    digest = hashlib.sha256(given.encode()).hexdigest()[:6]
    return Job(f"{name}_{digest}", overrides, Path(absolute(given)))


def of_the_sweep(line: str) -> bool:
    """Whether an override is none of the job: one of `sweep`, or Hydra's except for where yaml files are."""
    key = line.partition("=")[0].lstrip("+~")
    return key.startswith(("sweep.", "hydra.", "hydra/")) and key != "hydra.searchpath"


def command_line(sweep: Sweep, job: Job) -> list[str]:
    """The process of a job."""
    line = [*sweep.program, *sweep.flags, *job.overrides]
    if job.run_dir is not None and not any(override.startswith("run_dir=") for override in job.overrides):
        quoted = str(job.run_dir).replace("\\", "\\\\").replace('"', '\\"')
        line.append(f'run_dir="{quoted}"')
    return line


def log_of(sweep: Sweep, job: Job) -> Path:
    """What a job prints where several run at once."""
    return sweep.records / f"{job.name}.log"


def enrol(sweep: Sweep, job: Job) -> Record:
    """The record of a job, made where there is none."""
    path = sweep.records / f"{job.name}.json"
    if path.exists():
        return read(path)
    run_dir = job.run_dir
    if run_dir is not None and run_dir.is_relative_to(sweep.folder):
        run_dir = run_dir.relative_to(sweep.folder)
    record = Record(overrides=list(job.overrides), run_dir=None if run_dir is None else str(run_dir))
    write(path, record)
    return record


def note_start(sweep: Sweep, job: Job, process: int) -> None:
    """Write down that a job is at work, in this process of this machine."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    changes: dict[str, Any] = {"started": now, "host": platform.node(), "process": process, "code": None}
    write(sweep.records / f"{job.name}.json", replace(enrol(sweep, job), **changes))


def note_end(sweep: Sweep, job: Job, code: int) -> None:
    """Write down how a job ended."""
    write(sweep.records / f"{job.name}.json", replace(enrol(sweep, job), process=None, code=code))


def read(path: Path) -> Record:
    """A record from its file. Raises ConfigError where that is none."""
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the record of a job of a sweep: remove it, or choose another folder"
        ) from error


def write(path: Path, record: Record) -> None:
    """A record to its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace(path, json.dumps(asdict(record), indent=2).encode())


def status_of(sweep: Sweep, name: str, record: Record, *, taken: bool = False) -> str:
    """How a job stands: first what its run directory shows, then whether it is at work, then how its process ended.

    Args:
        sweep: the job is part of it.
        name: of the job.
        record: of the job.
        taken: this process has the right to run the job, so nobody is at work on it.
    """
    folder = sweep.folder
    run_dir = None if record.run_dir is None else folder / record.run_dir
    if run_dir is not None and directory.is_finished(run_dir):
        return FINISHED
    if not taken and is_at_work(sweep, name, record):
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
    """How a job of the sweep in `folder` ended: its process or, where that submitted a job of Slurm, that job."""
    if record.code == 0 and record.run_dir is not None:
        return recorded_exit_code(folder / record.run_dir) or 0
    return record.code


def is_at_work(sweep: Sweep, name: str, record: Record) -> bool:
    """Whether somebody runs a job: this or another sweep, a process that its sweep left behind, a run by hand."""
    if record.run_dir is not None and directory.is_held(sweep.folder / record.run_dir):
        return True
    file = lock(_right_to_run(sweep, name))
    if file is None:
        return True
    file.close()
    return not can_lock(sweep.records) and _is_alive(record)


def take(sweep: Sweep, job: Job) -> IO[str] | None:
    """The right to run a job, which the file and its copies in other processes hold until all are closed.

    None while somebody else is at work on the job. A run that Slurm has is asked for by its job's process.
    """
    file = lock(_right_to_run(sweep, job.name))
    if file is None:
        return None
    handed_on = sweep.submits and job.run_dir is not None and submitted_job(job.run_dir) is not None
    busy = job.run_dir is not None and not handed_on and directory.is_held(job.run_dir)
    if busy or (not can_lock(sweep.records) and _is_alive(enrol(sweep, job))):
        file.close()
        return None
    return file


def _right_to_run(sweep: Sweep, name: str) -> Path:
    """The file whose lock a sweep and the process of the job hold, so that it outlives either."""
    return sweep.records / f"{name}.lock"


def who_runs(sweep: Sweep, job: Job) -> str:
    """Who is at work on a job, in words."""
    if job.run_dir is not None and directory.is_held(job.run_dir):
        told = (job.run_dir / ".lock").read_text(encoding="utf-8", errors="replace").strip()
        if told:
            return told
    record = enrol(sweep, job)
    return "another process" if record.process is None else f"process {record.process} on {record.host}"


def _is_alive(record: Record) -> bool:
    """Whether the process of a job is at work on this machine, and is not another that got its number."""
    if record.process is None or record.host != platform.node() or not atomic.is_alive(record.process):
        return False
    try:
        line = (PROC / str(record.process) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return not PROC.exists()
    return all(override.encode() in line for override in record.overrides)


def is_due(sweep: Sweep, job: Job, *, taken: bool = False) -> bool:
    """Whether a job has to be run, now or again, or waited for.

    Args:
        sweep: the job is part of it.
        job: the one that is asked about.
        taken: see `status_of`.
    """
    status = status_of(sweep, job.name, enrol(sweep, job), taken=taken)
    if status == FINISHED:
        return sweep.command == "eval"
    return status != FAILED or sweep.settings.retry_failed


def stop_with_sweep() -> None:
    """Where a sweep started this process, save and stop when that is gone, even by SIGKILL (Linux only)."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)
