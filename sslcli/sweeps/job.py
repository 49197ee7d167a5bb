"""Jobs of a sweep (`--multirun`): their command lines, and their records.

A record is a JSON file in the sweep's folder with the settings and the state of one job. It remains after the sweep
exits.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sslcli.config.comparison import digest_of_settings
from sslcli.config.moved import old_override
from sslcli.config.paths import absolute
from sslcli.config.settings import SweepSettings
from sslcli.runs.identity import default_name
from sslcli.system import atomic
from sslcli.system.child_processes import signal_with_parent
from sslcli.system.stored import read_json

PARENT = "SSLCLI_SWEEP"  # environment variable of a job: process ID of the sweep that started the job


@dataclass(frozen=True)
class Sweep:
    """Settings that all jobs of a sweep have in common.

    A sweep (`--multirun`) runs one job for each combination of values. Instances can be pickled, to be sent to other
    processes.
    """

    command: str  # train or eval
    program: tuple[str, ...]  # beginning of the command line of a job
    folder: Path  # absolute
    settings: SweepSettings
    flags: tuple[str, ...]  # flags for every job, such as --config-dir=...
    shared: tuple[str, ...]  # overrides that all jobs have
    submits: bool = False  # True if a job's process only submits its run to Slurm
    reuses: bool = False  # True if jobs of other sweeps in the same parent folder are reused, see sslcli.sweeps.reuse

    @property
    def records(self) -> Path:
        """Folder of the records, logs and locks of the jobs."""
        return self.folder / "jobs"

    @property
    def metric(self) -> str | None:
        """Name of the scalar in metrics.jsonl that ranks the jobs.

        It is None for ssl-eval, because jobs of ssl-eval have no metrics.jsonl.
        """
        return None if self.command == "eval" else self.settings.metric

    def title(self, job: Job) -> str:
        """Return the display name of a job: its overrides, without the overrides that all jobs have."""
        return " ".join(line for line in job.overrides if line not in self.shared) or "defaults"


@dataclass(frozen=True)
class Length:
    """The keys of the section `train` that determine the number of steps of a run."""

    epochs: int
    max_steps: int | None
    extend: str


@dataclass(frozen=True)
class Job:
    """One job of a sweep (`--multirun`): one combination of the values that are swept."""

    name: str  # name of the record, and of the run directory if run_dir is not set
    overrides: tuple[str, ...]  # as on the command line
    run_dir: Path | None  # None for a job of ssl-eval
    digest: str | None = None  # digest of the settings that affect the results; None for a job of ssl-eval
    length: Length | None = None  # None for a job of ssl-eval


@dataclass(frozen=True, kw_only=True)
class Record:
    """Record of a job on disk. The record remains after the sweep exits.

    A job that belongs to several sweeps has one record per sweep. The fields `started`, `host`, `process` and `code`
    are its state. Only the record of the sweep that ran the job first contains the state. In the other records, these
    fields are not used, and `source` is the path of the first record.
    """

    overrides: list[str]
    run_dir: str | None  # relative to the sweep's folder if it is inside that folder
    started: str | None = None
    host: str | None = None
    process: int | None = None
    code: int | None = None  # exit code; -N means that signal N ended the process
    digest: str | None = None  # see `Job`; version 0.2 wrote neither `digest` nor the length
    epochs: int | None = None
    max_steps: int | None = None
    extend: str | None = None
    source: str | None = None  # path of the record of another sweep, relative to the folder of this record


def job_of(sweep: Sweep, config: dict[str, Any]) -> Job:
    """Return the `Job` for the configuration of one job.

    `config` is the validated configuration of the job, as plain values.
    """
    overrides = tuple(line for line in config["_lines_"] if not is_sweep_setting(line))
    if sweep.command == "eval":
        return Job(
            hashlib.sha256("\n".join(map(old_override, overrides)).encode("utf-8", "surrogatepass")).hexdigest()[:8],
            overrides,
            None,
        )
    name, given = default_name(config["_choices_"], config["_overrides_"]), config["_run_dir_"]
    run_dir = sweep.folder / name
    if given is not None:
        name += "_" + hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:6]
        run_dir = Path(absolute(given))
    train = config["train"]
    length = Length(train["epochs"], train["max_steps"], train["extend"])
    return Job(name, overrides, run_dir, digest=digest_of_settings(config), length=length)


def is_sweep_setting(line: str) -> bool:
    """Return True if the override `line` applies to the sweep and not to its jobs.

    Overrides of `sweep.*` and `hydra.*` apply to the sweep. The only exception is `hydra.searchpath`.
    """
    key = line.partition("=")[0].lstrip("+~")
    return key.startswith(("sweep.", "hydra.", "hydra/")) and key != "hydra.searchpath"


def command_line(sweep: Sweep, job: Job) -> list[str]:
    """Return the command line that runs a job in its own process.

    For ssl-train, the command line also sets the run directory. Jobs of ssl-eval have no run directory of their own.
    """
    line = [*sweep.program, *sweep.flags, *job.overrides]
    if job.run_dir is not None and not any(override.startswith("run_dir=") for override in job.overrides):
        quoted = str(job.run_dir).replace("\\", "\\\\").replace('"', '\\"')
        line.append(f'run_dir="{quoted}"')
    return line


def log_of(sweep: Sweep, job: Job) -> Path:
    """Return the log file of a job.

    If several jobs run in parallel, each job prints into its log file instead of the console.
    """
    return sweep.records / f"{job.name}.log"


def record_path(sweep: Sweep, name: str) -> Path:
    """Return the path of the record of the job `name` in the sweep's folder."""
    return sweep.records / f"{name}.json"


def source_of(sweep: Sweep, record: Record) -> Path | None:
    """Return the path of another sweep's record, if that record contains the state of a job.

    If a job belongs to several sweeps, only the record of the sweep that ran it first contains the state (start time,
    host, process, exit code). `record` is the job's record in this sweep. Return None if `record` itself contains the
    state, or if the other record was deleted.
    """
    path = None if record.source is None else sweep.records / record.source
    return path if path is not None and path.exists() else None


def read_record(sweep: Sweep, name: str) -> Record:
    """Return the record of the job `name`.

    If another sweep ran the job first, the state (start time, host, process, exit code) is taken from that sweep's
    record of the job.
    """
    record = read(record_path(sweep, name))
    source = source_of(sweep, record)
    if source is None:
        return record
    state = read(source)
    return replace(record, started=state.started, host=state.host, process=state.process, code=state.code)


def read_or_create_record(sweep: Sweep, job: Job) -> Record:
    """Return the record of a job. If it does not exist, write and return a new record.

    A new record has no state (start time, host, process, exit code).
    """
    path = record_path(sweep, job.name)
    if path.exists():
        return read_record(sweep, job.name)
    run_dir = job.run_dir
    if run_dir is not None and run_dir.is_relative_to(sweep.folder):
        run_dir = run_dir.relative_to(sweep.folder)
    record = Record(
        overrides=list(job.overrides),
        run_dir=None if run_dir is None else str(run_dir),
        **settings_of(job),
    )
    write(path, record)
    return record


def settings_of(job: Job) -> dict[str, Any]:
    """Return the fields of a job's record that depend on the settings of the job.

    The fields are the digest of the settings that affect the results, and the length of the run. Jobs of ssl-eval have
    no length.
    """
    return {"digest": job.digest} | ({} if job.length is None else asdict(job.length))


def record_settings(sweep: Sweep, job: Job) -> None:
    """Write the current settings of a job to its record.

    They may differ from those of an earlier command if a yaml file has changed since then.
    """
    path = record_path(sweep, job.name)
    record = read(path)
    current = replace(record, **settings_of(job))
    if current != record:
        write(path, current)


def record_start(sweep: Sweep, job: Job, process: int) -> None:
    """Write the start time, this machine, and the process ID `process` of a job to its record."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    _record_state(sweep, job, started=now, host=platform.node(), process=process, code=None)


def record_end(sweep: Sweep, job: Job, code: int) -> None:
    """Write the exit code `code` of a job to its record."""
    _record_state(sweep, job, process=None, code=code)


def _record_state(sweep: Sweep, job: Job, **changes: Any) -> None:
    """Change fields of a job's state: start time, host, process or exit code.

    If another sweep ran the job first, that sweep's record of the job contains the state. In this case, that record is
    changed.
    """
    path = source_of(sweep, read_or_create_record(sweep, job)) or record_path(sweep, job.name)
    write(path, replace(read(path), **changes))


def read(path: Path) -> Record:
    """Read the record of a job from its JSON file. Raises DamagedFile if the file is not such a record."""
    return read_json(path, Record, remedy="remove it, or choose another hydra.sweep.dir")


def write(path: Path, record: Record) -> None:
    """Write the record of a job to its JSON file atomically. The folder is created if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace(path, json.dumps(asdict(record), indent=2).encode())


def stop_with_sweep() -> None:
    """If a sweep started this process, let the kernel send SIGTERM to this process when the sweep ends (Linux only).

    The kernel also does this if SIGKILL ends the sweep. A run that receives SIGTERM saves a checkpoint and stops.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        signal_with_parent(int(parent), signal.SIGTERM)
