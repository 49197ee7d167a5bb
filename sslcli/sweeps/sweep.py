"""`--multirun`: runs the jobs of a sweep. Each job has its own process, and a record in the sweep's folder.

By default, all jobs are known before the first job starts, and the job queue of this machine runs the jobs. With a
Hydra sweeper plugin, the jobs are sampled while the sweep runs. A Hydra launcher plugin can run the jobs on other
machines.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslcli.config.comparison import flatten
from sslcli.config.paths import absolute
from sslcli.config.settings import SweepSettings
from sslcli.errors import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_STOPPED,
    ConfigError,
    disk_failure,
    is_disk_failure,
    print_error,
)
from sslcli.report.terminal import print_text
from sslcli.runs.directory import check_below
from sslcli.runs.identity import digest_of, result_overrides
from sslcli.sweeps import reuse, table
from sslcli.sweeps.job import (
    Job,
    Sweep,
    job_of,
    read_or_create_record,
    record_settings,
)
from sslcli.sweeps.queue import run_queue, wait_for
from sslcli.sweeps.slots import Slot, slots_of
from sslcli.sweeps.status import (
    FAILED,
    INTERRUPTED,
    RUNNING,
    STOPPED,
    WAITING,
    is_due,
    is_finished,
    is_running,
    status_of,
)
from sslcli.sweeps.table import Row
from sslcli.system import child_processes

EVAL_SETTINGS = SweepSettings(metric="monitor/knn_top1", direction="auto", jobs=None, retry_failed=True)
DEFAULT_FOLDER = "runs/sweep"  # value of hydra.sweep.dir in the yaml files
# Launchers that run jobs on this machine and do not assign devices to the jobs.
LOCAL_LAUNCHERS = ("basic", "joblib", "submitit_local")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Command line of a sweep, and the functions that call Hydra plugins.

    Attributes:
        overrides: overrides as given on the command line.
        flags: flags for every job, such as --config-dir=...
        launch: function that runs jobs with the chosen Hydra launcher. It returns two booleans: (sweep was stopped,
            launcher failed).
        draw: function that samples jobs with the chosen Hydra sweeper and runs the jobs with the named launcher. It
            returns two booleans: (sweep was stopped, sweeper failed).
    """

    overrides: tuple[str, ...]
    flags: tuple[str, ...]
    launch: Callable[[Sweep, list[Job], list[Slot] | None], tuple[bool, bool]]
    draw: Callable[[Sweep, str, list[Slot] | None], tuple[bool, bool]]


def run_sweep(command: str, configs: list[dict[str, Any]], line: CommandLine) -> int:
    """Run the jobs of a sweep, and return the exit code.

    Exit code 75 means that a job was stopped; the same command resumes it. Exit code 2 or 3 means that all jobs were
    started, and at least one of them failed.

    Args:
        command: train or eval.
        configs: validated configurations of the jobs, as plain values.
        line: command line of the sweep.
    """
    sweep = sweep_of(command, configs, line)
    try:
        return _run(sweep, configs, line)
    except OSError as error:
        failure = disk_failure(error, sweep.folder, "hydra.sweep.dir")
        if failure is None:
            raise
        message, code = failure
        print_error(command, message)
        return code


def _run(sweep: Sweep, configs: list[dict[str, Any]], line: CommandLine) -> int:
    choices = configs[0]["_choices_"]
    drawn, launcher = choices["hydra/sweeper"] != "basic", choices["hydra/launcher"]
    check_plugins(sweep, configs, drawn=drawn, launcher=launcher)
    jobs = [] if drawn else distinct_jobs(sweep, configs)
    prepare(sweep, jobs)
    due = [job for job in jobs if is_due(sweep, job)]
    if not drawn:
        print_text(summary(sweep, jobs, due))
    slots: list[Slot] | None = None
    if launcher in LOCAL_LAUNCHERS and (drawn or due):
        slots = slots_of(configs[0], jobs=None if drawn else len(due), wanted=sweep.settings.jobs)
        if len(slots) > 1:
            print_text(f"{len(slots)} jobs in parallel: {', '.join(map(str, slots))}")
    ended_early = False
    if drawn:
        stopped, ended_early = line.draw(sweep, launcher, slots)
    elif launcher == "basic" or not due:
        stopped = run_queue(sweep, due, slots, quiet=slots is not None and len(slots) > 1)
    else:
        stopped, ended_early = _launch(sweep, due, line, slots)
    rows = table.update(sweep)
    print_text(f"\n{table.as_text(rows, sweep.metric)}")
    print_text(f"\ntable: {sweep.folder / 'sweep.csv'}")
    if sweep.metric is not None and rows and all(row.value is None for row in rows):
        print_text(
            f"no job has {sweep.metric}: check sweep.metric, and that the jobs measure it (monitor.knn_every_epochs)"
        )
    names = {job.name for job in jobs}
    code = exit_code([row for row in rows if drawn or row.name in names], stopped=stopped)
    return code or (EXIT_FAILED if ended_early else 0)


def _launch(sweep: Sweep, due: list[Job], line: CommandLine, slots: list[Slot] | None) -> tuple[bool, bool]:
    """Run the jobs `due` with a Hydra launcher. Return two booleans: (sweep was stopped, launcher failed).

    If another process runs a job, the job is launched after that process ends. If the job were launched earlier, it
    would only wait in the launcher's queue. `slots` are devices and CPU cores of this machine. Each slot runs one job
    at a time. None = jobs start immediately.
    """
    while due:
        busy = [job for job in due if is_running(sweep, job.name, read_or_create_record(sweep, job))]
        free = [job for job in due if job not in busy]
        if free:
            stopped, ended_early = line.launch(sweep, free, slots)
            if stopped or ended_early:
                return stopped, ended_early
        if busy and wait_for(sweep, busy):
            return True, False
        due = [job for job in busy if is_due(sweep, job)]
    return False, False


def sweep_of(command: str, configs: list[dict[str, Any]], line: CommandLine) -> Sweep:
    """Return the `Sweep` of a command line.

    `command` is train or eval. `configs` are the configurations of the jobs. If the command line does not choose the
    folder of the sweep, the name of the folder contains a digest of the overrides.
    """
    folder = configs[0]["_sweep_dir_"]
    is_default = folder == DEFAULT_FOLDER and not any(each.startswith("hydra.sweep.dir=") for each in line.overrides)
    if is_default:
        folder = f"{folder}_{digest_of(line.overrides) or 'default'}"
    overrides = [config["_lines_"] for config in configs]
    return Sweep(
        command=command,
        program=program_of(command),
        folder=Path(absolute(folder)),
        settings=SweepSettings(**configs[0]["sweep"]) if command == "train" else EVAL_SETTINGS,
        flags=line.flags,
        shared=tuple(each for each in overrides[0] if all(each in others for others in overrides)),
        submits=any(config.get("launcher", {}).get("kind") == "slurm" for config in configs),
        reuses=is_default and command == "train",
    )


def program_of(command: str) -> tuple[str, ...]:
    """Return the first words of a command line that runs ssl-COMMAND with the Python interpreter of this process.

    The command line does not depend on the environment variable PATH.
    """
    return sys.executable, *child_processes.arguments(f"sslcli.cli.{command}")


def check_plugins(sweep: Sweep, configs: list[dict[str, Any]], *, drawn: bool, launcher: str) -> None:
    """Raise ConfigError if the chosen Hydra sweeper or launcher cannot run this sweep.

    `drawn` is True if a sweeper plugin samples the jobs. `launcher` is the name of the launcher.
    """
    if launcher == "submitit_slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "hydra/launcher=submitit_slurm needs Slurm, but sbatch is not installed on this machine: use submitit_local"
        )
    measured = sweep.metric or ""
    if drawn and measured.startswith("monitor/") and any(c["monitor"]["knn_every_epochs"] == 0 for c in configs):
        raise ConfigError(
            f"monitor.knn_every_epochs is 0, so {measured} is never measured, but the sweeper needs it: set "
            "monitor.knn_every_epochs to 1, or choose another sweep.metric"
        )


def distinct_jobs(sweep: Sweep, configs: list[dict[str, Any]]) -> list[Job]:
    """Return the jobs of the configurations. If several configurations have identical settings, they are one job.

    Raises ConfigError if two jobs have the same run directory, or differ only in settings that do not affect the
    results.
    """
    seen: dict[Path | str, tuple[Job, dict[str, Any]]] = {}
    for config in configs:
        job, settings = job_of(sweep, config), flatten(config, leave_out=("about", "name", "run_dir", "sweep"))
        has_own_place = config.get("run_dir") is not None
        place = job.run_dir if has_own_place and job.run_dir is not None else job.digest or job.name
        if place in seen and seen[place][1] != settings:
            raise ConfigError(_conflict(seen[place][0], job, has_own_place=has_own_place))
        seen.setdefault(place, (job, settings))
    if len(seen) < len(configs):
        print_text(f"{len(configs)} combinations of values, but {len(seen)} different jobs: identical jobs run once")
    return [job for job, _ in seen.values()]


def _conflict(one: Job, other: Job, *, has_own_place: bool) -> str:
    """Return the error message for two jobs that would train the same run.

    `has_own_place` is True if the command line or a yaml file sets `run_dir`.
    """
    if has_own_place:
        return (
            f"run_dir is {str(one.run_dir)!r} for several jobs: set hydra.sweep.dir={one.run_dir} instead, and each "
            "job gets a directory in it"
        )
    return (
        f"the jobs {' '.join(one.overrides)!r} and {' '.join(other.overrides)!r} have the same run directory, because "
        "no setting that affects the result differs: remove one of them, or sweep run_dir as well"
    )


def prepare(sweep: Sweep, jobs: list[Job]) -> None:
    """Create the folder of a sweep and the records of its jobs.

    If another sweep has the same job, link the job to it (see `reuse.reuse`).

    Raises ConfigError if the folder cannot be written, or if it contains a different job with the same name.
    """
    try:
        sweep.records.mkdir(parents=True, exist_ok=True)
        (sweep.records / "stop").unlink(missing_ok=True)
    except OSError as error:
        if is_disk_failure(error):  # run_sweep prints this error
            raise
        raise ConfigError(
            f"hydra.sweep.dir is {sweep.folder}, but it cannot be written ({error.strerror}): choose another directory"
        ) from error
    check_below(sweep.records)
    for job in jobs:
        known = read_or_create_record(sweep, job).overrides
        if result_overrides(known) != result_overrides(job.overrides):  # two different jobs have the same name
            raise ConfigError(
                f"{sweep.folder} already has a job named {job.name} with other overrides ({' '.join(known)}): choose "
                "another hydra.sweep.dir"
            )
        if not is_finished(sweep, job):  # the records of finished jobs of older versions are not changed
            record_settings(sweep, job)
    reuse.reuse(sweep, jobs)


def summary(sweep: Sweep, jobs: list[Job], due: list[Job]) -> str:
    """Return text whose first line shows the number of jobs, their statuses, and the number of jobs that will run.

    If jobs of other sweeps are reused, further lines show the folders of these sweeps. `due` are the jobs that must be
    started, resumed or waited for.
    """
    counts = Counter(status_of(sweep, job.name, read_or_create_record(sweep, job)) for job in jobs)
    counts.pop(WAITING, None)
    before = "".join(f", {count} {status}" for status, count in counts.items())
    retried = not sweep.settings.retry_failed and counts[FAILED]
    hint = " (sweep.retry_failed=true resumes failed jobs)" if retried else ""
    wait = f", {counts[RUNNING]} to wait for" if counts[RUNNING] else ""
    first = f"{len(jobs)} jobs in {sweep.folder}{before}; {max(0, len(due) - counts[RUNNING])} to run{wait}{hint}"
    reused = Counter(reuse.reused_folders(sweep, jobs))
    return "\n".join([first, *(f"{count} of these jobs from {folder}" for folder, count in reused.items())])


def exit_code(rows: list[Row], *, stopped: bool) -> int:
    """Return the exit code of a sweep: 75 if it or a job was stopped, 0 if no job failed, and otherwise 2 or 3.

    The code is 2 if every failed job had an invalid configuration. `rows` are the rows of the jobs in the table of
    results. `stopped` is True if the sweep was stopped.
    """
    statuses = {row.status for row in rows}
    if stopped or STOPPED in statuses:
        return EXIT_STOPPED
    codes = {row.code for row in rows if row.status in (FAILED, INTERRUPTED, WAITING)}
    if not codes:
        return 0
    return EXIT_CONFIG if codes == {EXIT_CONFIG} else EXIT_FAILED
