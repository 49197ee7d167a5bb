"""`--multirun`: the jobs of a sweep, each a process of its own, and a folder that outlives the sweep.

The jobs are known before the first one starts, unless another sweeper of Hydra draws them while it runs. They run in a
queue on this machine, unless another launcher of Hydra carries them somewhere else.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslcli.config.paths import absolute
from sslcli.config.settings import SweepSettings
from sslcli.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED, ConfigError, disk_failure
from sslcli.runs.directory import check_below
from sslcli.runs.identity import digested, telling
from sslcli.sweeps import table
from sslcli.sweeps.job import (
    FAILED,
    INTERRUPTED,
    RUNNING,
    STOPPED,
    WAITING,
    Job,
    Sweep,
    enrol,
    is_at_work,
    is_due,
    job_of,
    status_of,
)
from sslcli.sweeps.queue import Slot, run_queue, slots_of, wait_for
from sslcli.sweeps.table import Row
from sslcli.system import child_processes

OF_EVAL = SweepSettings(metric="monitor/knn_top1", direction="auto", jobs=None, retry_failed=True)
DEFAULT_FOLDER = "runs/sweep"  # in the yaml files
ON_THIS_MACHINE = ("basic", "joblib", "submitit_local")  # launchers that do not share out devices themselves


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line of a sweep, and what Hydra does for it.

    Attributes:
        overrides: as they were given.
        flags: that every job needs, as --config-dir=...
        launch: runs jobs with the chosen launcher of Hydra; returns whether the sweep was stopped, and whether the
            launcher gave up.
        draw: lets the chosen sweeper of Hydra draw jobs and run them with the named launcher; returns the same.
    """

    overrides: tuple[str, ...]
    flags: tuple[str, ...]
    launch: Callable[[Sweep, list[Job], list[Slot] | None], tuple[bool, bool]]
    draw: Callable[[Sweep, str, list[Slot] | None], tuple[bool, bool]]


def sweep(command: str, configs: list[dict[str, Any]], line: CommandLine) -> int:
    """Run the checked jobs of a command; the exit code.

    75: stopped, and the same command goes on. 2 or 3: all was tried and something failed.
    """
    this = sweep_of(command, configs, line)
    try:
        return _carry_out(this, configs, line)
    except OSError as error:
        told = disk_failure(error, this.folder, "hydra.sweep.dir")
        if told is None:
            raise
        message, code = told
        print(f"ssl-{command}: {message}", file=sys.stderr)
        return code


def _carry_out(this: Sweep, configs: list[dict[str, Any]], line: CommandLine) -> int:
    choices = configs[0]["_choices_"]
    drawn, launcher = choices["hydra/sweeper"] != "basic", choices["hydra/launcher"]
    check_engine(this, configs, drawn=drawn, launcher=launcher)
    jobs = [] if drawn else [job_of(this, config) for config in configs]
    check_distinct(jobs)
    prepare(this, jobs)
    due = [job for job in jobs if is_due(this, job)]
    if not drawn:
        print(summary(this, jobs, due), flush=True)
    slots: list[Slot] | None = None
    if launcher in ON_THIS_MACHINE and (drawn or due):
        slots = slots_of(configs[0], jobs=None if drawn else len(due), wanted=this.settings.jobs)
        if len(slots) > 1:
            print(f"{len(slots)} at once: {', '.join(map(str, slots))}", flush=True)
    ended_early = False
    if drawn:
        stopped, ended_early = line.draw(this, launcher, slots)
    elif launcher == "basic" or not due:
        stopped = run_queue(this, due, slots, quiet=slots is not None and len(slots) > 1)
    else:
        stopped, ended_early = _carried(this, due, line, slots)
    rows = table.update(this)
    print(f"\n{table.as_text(rows, this.metric)}")
    print(f"\nthe table: {this.folder / 'sweep.csv'}")
    if this.metric is not None and rows and all(row.value is None for row in rows):
        print(f"no job has {this.metric}: see sweep.metric, and whether the jobs measure it (monitor.knn_every_epochs)")
    names = {job.name for job in jobs}
    code = exit_code([row for row in rows if drawn or row.name in names], stopped=stopped)
    return code or (EXIT_FAILED if ended_early else 0)


def _carried(this: Sweep, due: list[Job], line: CommandLine, slots: list[Slot] | None) -> tuple[bool, bool]:
    """Let a launcher of Hydra run the jobs; whether the sweep was stopped, and whether the launcher gave up.

    Jobs that others are at work on are waited for here, where that takes no place in a queue.
    """
    while due:
        busy = [job for job in due if is_at_work(this, job.name, enrol(this, job))]
        free = [job for job in due if job not in busy]
        if free:
            stopped, ended_early = line.launch(this, free, slots)
            if stopped or ended_early:
                return stopped, ended_early
        if busy and wait_for(this, busy):
            return True, False
        due = [job for job in busy if is_due(this, job)]
    return False, False


def sweep_of(command: str, configs: list[dict[str, Any]], line: CommandLine) -> Sweep:
    """What the jobs of a command line have in common; its folder is named by the overrides unless one is given."""
    folder = configs[0]["_sweep_dir_"]
    if folder == DEFAULT_FOLDER and not any(override.startswith("hydra.sweep.dir=") for override in line.overrides):
        folder = f"{folder}_{digested(line.overrides) or 'default'}"
    overrides = [config["_lines_"] for config in configs]
    return Sweep(
        command=command,
        program=program_of(command),
        folder=Path(absolute(folder)),
        settings=SweepSettings(**configs[0]["sweep"]) if command == "train" else OF_EVAL,
        flags=line.flags,
        shared=tuple(each for each in overrides[0] if all(each in others for others in overrides)),
        submits=any(config.get("launcher", {}).get("kind") == "slurm" for config in configs),
    )


def program_of(command: str) -> tuple[str, ...]:
    """What starts a command, whatever is on the path."""
    return sys.executable, *child_processes.arguments(f"sslcli.cli.{command}")


def check_engine(this: Sweep, configs: list[dict[str, Any]], *, drawn: bool, launcher: str) -> None:
    """Raise ConfigError where sweeper or launcher cannot work."""
    if launcher == "submitit_slurm" and shutil.which("sbatch") is None:
        raise ConfigError("hydra/launcher=submitit_slurm needs Slurm, but there is no sbatch here: try submitit_local")
    measured = this.metric or ""
    if drawn and measured.startswith("monitor/") and any(c["monitor"]["knn_every_epochs"] == 0 for c in configs):
        raise ConfigError(
            f"monitor.knn_every_epochs is 0, but the sweeper needs {measured}, which is then never measured: set it "
            "to 1, or choose another sweep.metric"
        )


def check_distinct(jobs: list[Job]) -> None:
    """Raise ConfigError where several jobs would share a run directory."""
    seen: dict[Path | str, Job] = {}
    for job in jobs:
        place = job.run_dir or job.name
        if place not in seen:
            seen[place] = job
            continue
        if any(line.startswith("run_dir=") for line in job.overrides):
            raise ConfigError(
                f"run_dir is {str(place)!r} for several jobs: give hydra.sweep.dir={place} in its place, and each job "
                "gets a directory in it"
            )
        one, other = (" ".join(lines.overrides) for lines in (seen[place], job))
        raise ConfigError(
            f"the jobs {one!r} and {other!r} would share a run directory: they differ in nothing that changes the "
            "result. Leave one out, or sweep run_dir as well"
        )


def prepare(this: Sweep, jobs: list[Job]) -> None:
    """Make the folder of a sweep and the records of its jobs. Raises ConfigError where that cannot be."""
    try:
        this.records.mkdir(parents=True, exist_ok=True)
        (this.records / "stop").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"hydra.sweep.dir is {this.folder}, but it cannot be written ({error.strerror}): choose another"
        ) from error
    check_below(this.records)
    for job in jobs:
        known = enrol(this, job).overrides
        if telling(known) != telling(job.overrides):  # the digests of both are the same by chance
            raise ConfigError(
                f"{this.folder} holds a job named {job.name} with other overrides ({' '.join(known)}): choose another "
                "hydra.sweep.dir"
            )


def summary(this: Sweep, jobs: list[Job], due: list[Job]) -> str:
    """How many jobs there are, how they stand, and what will be run."""
    counts = Counter(status_of(this, job.name, enrol(this, job)) for job in jobs)
    counts.pop(WAITING, None)
    before = "".join(f", {count} {status}" for status, count in counts.items())
    retried = not this.settings.retry_failed and counts[FAILED]
    hint = " (sweep.retry_failed=true runs failed jobs again)" if retried else ""
    wait = f", {counts[RUNNING]} to wait for" if counts[RUNNING] else ""
    return f"{len(jobs)} jobs in {this.folder}{before}; {max(0, len(due) - counts[RUNNING])} to run{wait}{hint}"


def exit_code(rows: list[Row], *, stopped: bool) -> int:
    """The exit code of a sweep from how its jobs stand."""
    statuses = {row.status for row in rows}
    if stopped or STOPPED in statuses:
        return EXIT_STOPPED
    codes = {row.code for row in rows if row.status in (FAILED, INTERRUPTED, WAITING)}
    if not codes:
        return 0
    return EXIT_CONFIG if codes == {EXIT_CONFIG} else EXIT_FAILED
