"""Sweeps (`--multirun`) with Hydra plugins.

A sweeper plugin samples the values of the jobs while the sweep runs. A launcher plugin runs the jobs, for example on
other machines.
"""

from __future__ import annotations

import logging
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

from sslcli.cli.compose import engine_of, plain
from sslcli.cli.hydra_errors import one_line
from sslcli.config.moved import current_config
from sslcli.config.paths import absolute_paths, numbers_as_text
from sslcli.errors import ConfigError
from sslcli.report.terminal import print_text
from sslcli.runs.identity import digest_of
from sslcli.sweeps.job import Job, Sweep, job_of, read_or_create_record, read_record
from sslcli.sweeps.queue import forwarded_signals, run_queue
from sslcli.sweeps.slots import Slot
from sslcli.sweeps.status import FINISHED, status_of
from sslcli.sweeps.table import value_of
from sslcli.system.child_processes import safe_children


class SweepStopped(Exception):
    """Raised by `QueueLauncher` if the sweep was stopped, so that Hydra's sweeper ends and samples no further jobs."""


@dataclass(frozen=True)
class Task:
    """Function that a Hydra launcher calls for each job. It may be called in any process and on any node.

    It runs the job, and returns the metric that the sweeper optimizes.

    Attributes:
        sweep: settings of the sweep.
        slots: devices and CPU cores of this machine. Each slot runs one job at a time. None = the job starts without
            waiting for a slot.
    """

    sweep: Sweep
    slots: list[Slot] | None

    def __call__(self, config: DictConfig) -> float | None:
        job = composed_job(self.sweep, config, HydraConfig.get())
        run_queue(self.sweep, [job], self.slots, quiet=True)
        return objective(self.sweep, job)


class QueueLauncher(Launcher):
    """Hydra launcher that runs jobs in parallel in the local job queue.

    Hydra's sweeper calls `launch` with the overrides of the jobs. Hydra's default launcher would run the jobs one after
    another.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        assert isinstance(task_function, Task)
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        sweep, slots = self.task.sweep, self.task.slots
        composed = [self.context.config_loader.load_sweep_config(self.config, list(lines)) for lines in job_overrides]
        jobs = [composed_job(sweep, config, config.hydra) for config in composed]
        if run_queue(sweep, jobs, slots, quiet=slots is not None and len(slots) > 1):
            raise SweepStopped
        returned = []
        for job in jobs:
            one = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
            one.return_value = objective(sweep, job)
            returned.append(one)
        return returned


def composed_job(sweep: Sweep, config: DictConfig, own: Any) -> Job:
    """Return the `Job` for a configuration that Hydra composed from the overrides of one job.

    `own` contains the settings of Hydra itself for this job, which Hydra stores under the key `hydra`.
    """
    lines = list(own.overrides.task)
    values = numbers_as_text(sweep.command, current_config(plain(config))[0], lines)
    return job_of(
        sweep,
        absolute_paths(sweep.command, values)
        | {
            "_choices_": OmegaConf.to_container(own.runtime.choices),
            "_overrides_": digest_of(lines),
            "_lines_": lines,
            "_run_dir_": values.get("run_dir"),
        },
    )


def objective(sweep: Sweep, job: Job) -> float | None:
    """Return the value of the sweep's metric for a job, or None if the job is not finished or has no metric.

    Hydra's sweeper optimizes this value.
    """
    if (
        job.run_dir is None
        or sweep.metric is None
        or status_of(sweep, job.name, read_or_create_record(sweep, job)) != FINISHED
    ):
        return None
    return value_of(job.run_dir, sweep.metric)


def launch_jobs(arguments: Namespace, sweep: Sweep, jobs: list[Job], slots: list[Slot] | None) -> tuple[bool, bool]:
    """Run `jobs` with the Hydra launcher that the command line chooses.

    `slots` are devices and CPU cores of this machine. Each slot runs one job at a time. None = jobs start without
    waiting for a slot. Return two booleans: (sweep was stopped, launcher failed).
    """

    def launch(engine: Hydra) -> None:
        config = composed(engine, sweep, arguments, [])
        context = HydraContext(config_loader=engine.config_loader, callbacks=Callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=Task(sweep, slots), config=config
        )
        with safe_children():
            launcher.launch([list(job.overrides) for job in jobs], initial_job_idx=0)

    return run_hydra(sweep, arguments, launch)


def draw_jobs(arguments: Namespace, sweep: Sweep, launcher: str, slots: list[Slot] | None) -> tuple[bool, bool]:
    """Run the jobs that Hydra's sweeper samples.

    `launcher` is the name of the Hydra launcher that runs the jobs. `slots` are devices and CPU cores of this machine.
    Each slot runs one job at a time. None = jobs start without waiting for a slot. Return two booleans: (sweep was
    stopped, sweeper failed).
    """
    if launcher == "basic":  # Hydra cannot find QueueLauncher by name, so it replaces BasicLauncher
        Plugins.instance().class_name_to_class[f"{BasicLauncher.__module__}.BasicLauncher"] = QueueLauncher

    def start(engine: Hydra) -> None:
        lines = optuna_overrides(composed(engine, sweep, arguments, []).hydra.sweeper, sweep, slots, arguments)
        with nullcontext() if launcher == "basic" else safe_children():
            engine.multirun(
                config_name=arguments.config_name or sweep.command,
                task_function=Task(sweep, slots),
                overrides=lines_of(sweep, arguments, lines),
                with_log_configuration=False,
            )

    return run_hydra(sweep, arguments, start)


def lines_of(sweep: Sweep, arguments: Namespace, more: list[str]) -> list[str]:
    """Return the overrides for Hydra: the overrides of the command line, the folder of the sweep, and `more`.

    If the command line contains `hydra.sweep.dir=...`, this override is replaced by the folder of `sweep`.
    """
    overrides = [line for line in arguments.overrides if not line.startswith("hydra.sweep.dir=")]
    quoted = str(sweep.folder).replace("\\", "\\\\").replace('"', '\\"')
    return [*overrides, f'hydra.sweep.dir="{quoted}"', *more]


def composed(engine: Hydra, sweep: Sweep, arguments: Namespace, more: list[str]) -> DictConfig:
    """Return the configuration that Hydra composes for the whole command line and the additional overrides `more`."""
    return engine.compose_config(
        config_name=arguments.config_name or sweep.command,
        overrides=lines_of(sweep, arguments, more),
        run_mode=RunMode.MULTIRUN,
        with_log_configuration=False,
    )


def optuna_overrides(sweeper: Any, sweep: Sweep, slots: list[Slot] | None, arguments: Namespace) -> list[str]:
    """Return overrides for Optuna's sweeper: the direction of the search, the number of parallel jobs, and the seed.

    The direction is "minimize" or "maximize". Because the seed is always 0, the same command samples the same jobs
    again and reuses the results of finished jobs. Keys that the command line sets are omitted. If `sweeper`, the
    configuration of the sweeper, does not belong to Optuna, the result is empty.
    """
    if "optuna" not in sweeper._target_:
        return []
    import optuna

    optuna.logging.set_verbosity(logging.ERROR)  # the table shows the result of each job
    direction = sweeper.direction
    if OmegaConf.is_list(direction):
        raise ConfigError(
            f"hydra.sweeper.direction is {list(direction)}, but a job has one result, sweep.metric: set one direction"
        )
    defaults = {
        "hydra.sweeper.direction": "minimize" if sweep.settings.is_minimized else "maximize",
        "hydra.sweeper.n_jobs": 1 if slots is None else len(slots),
    }
    if "seed" in sweeper.sampler:
        defaults["hydra.sweeper.sampler.seed"] = 0
    keys = {line.partition("=")[0] for line in arguments.overrides}
    return [f"{key}={value}" for key, value in defaults.items() if key not in keys]


def run_hydra(sweep: Sweep, arguments: Namespace, start: Callable[[Hydra], None]) -> tuple[bool, bool]:
    """Call `start`, which runs a Hydra plugin (a sweeper or a launcher) until all jobs have ended.

    Return two booleans: (sweep was stopped, plugin failed).

    If the plugin fails before any job was started, ConfigError is raised. If it fails later, the error is only printed,
    so that the caller can still write the table of results from the records of the jobs.
    """
    before = started(sweep)
    with signal_file(sweep) as received:
        try:
            version.setbase("1.3")  # as hydra.main does; otherwise, jobs change their working directory
            start(engine_of(arguments))
        except (SweepStopped, KeyboardInterrupt):
            return True, False
        except ConfigError:
            raise
        except Exception as error:  # plugins may raise any error
            if started(sweep) == before:
                raise ConfigError(f"Hydra could not start the sweep: {one_line(error)}") from error
            print_text(
                f"ssl-{sweep.command}: the sweep ended early: {one_line(error)}. Jobs that run elsewhere continue; run "
                "the same command again to print their status and to start the remaining jobs",
                to_stderr=True,
            )
            return bool(received), True
        finally:
            GlobalHydra.instance().clear()
        return bool(received), False


def started(sweep: Sweep) -> dict[str, str | None]:
    """Return the last start time of each job, as name of the job -> time.

    The time of a job that never started is None.
    """
    return {path.stem: read_record(sweep, path.stem).started for path in sweep.records.glob("*.json")}


@contextmanager
def signal_file(sweep: Sweep) -> Iterator[list[int]]:
    """If a signal arrives within the `with` block, create the file `jobs/stop` in the sweep's folder.

    Every process that runs jobs of the sweep, on any node, checks for this file and then stops its jobs. If SIGINT
    arrives after an earlier signal, the block ends immediately. Yields the list of received signals.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        (sweep.records / "stop").touch()
        print_text("stopping: running jobs save and stop; a second interrupt does not wait for them")

    previous = {number: signal.signal(number, receive) for number in forwarded_signals()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
