"""Sweeps whose jobs another sweeper of Hydra draws, or another launcher of Hydra carries to where they run."""

from __future__ import annotations

import logging
import signal
import sys
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

from sslcli.cli.compose import engine_of
from sslcli.cli.messages import one_line
from sslcli.errors import ConfigError
from sslcli.runs.identity import digested
from sslcli.sweeps.job import FINISHED, Job, Sweep, enrol, job_of, read, status_of
from sslcli.sweeps.queue import Slot, handed_on, run_queue
from sslcli.sweeps.table import value_of
from sslcli.system.child_processes import safe_children


class SweepStopped(Exception):
    """Ends a sweeper that would draw more jobs."""


@dataclass(frozen=True)
class Task:
    """What a launcher of Hydra calls for each job, in whatever process and on whatever node."""

    sweep: Sweep
    slots: list[Slot] | None

    def __call__(self, _: DictConfig) -> float | None:
        job = composed_job(self.sweep, HydraConfig.instance().cfg)
        run_queue(self.sweep, [job], self.slots, quiet=True)
        return objective(self.sweep, job)


class QueueLauncher(Launcher):
    """Runs what a sweeper draws at once in our queue, where Hydra's own default runs one after the other."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        assert isinstance(task_function, Task)
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        sweep, slots = self.task.sweep, self.task.slots
        composed = [self.context.config_loader.load_sweep_config(self.config, list(lines)) for lines in job_overrides]
        jobs = [composed_job(sweep, config) for config in composed]
        if run_queue(sweep, jobs, slots, quiet=slots is not None and len(slots) > 1):
            raise SweepStopped
        returned = []
        for job in jobs:
            one = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
            one.return_value = objective(sweep, job)
            returned.append(one)
        return returned


def composed_job(sweep: Sweep, config: Any) -> Job:
    """The job that a configuration of Hydra's stands for."""
    lines = list(config.hydra.overrides.task)
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    run_dir = config.get("run_dir")
    return job_of(sweep, {"_choices_": choices, "_overrides_": digested(lines), "_lines_": lines, "_run_dir_": run_dir})


def objective(sweep: Sweep, job: Job) -> float | None:
    """The metric of a finished job, which a sweeper optimizes."""
    if job.run_dir is None or sweep.metric is None or status_of(sweep, job.name, enrol(sweep, job)) != FINISHED:
        return None
    return value_of(job.run_dir, sweep.metric)


def carry(arguments: Namespace, sweep: Sweep, jobs: list[Job], slots: list[Slot] | None) -> tuple[bool, bool]:
    """Let the chosen launcher run the jobs; whether the sweep was stopped, and whether the launcher gave up."""

    def launch(engine: Hydra) -> None:
        config = composed(engine, sweep, arguments, [])
        context = HydraContext(config_loader=engine.config_loader, callbacks=Callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=Task(sweep, slots), config=config
        )
        with safe_children():
            launcher.launch([list(job.overrides) for job in jobs], initial_job_idx=0)

    return watched(sweep, arguments, launch)


def draw(arguments: Namespace, sweep: Sweep, launcher: str, slots: list[Slot] | None) -> tuple[bool, bool]:
    """Let the chosen sweeper draw jobs; whether the sweep was stopped, and whether the sweeper gave up."""
    if launcher == "basic":  # Hydra builds launchers from its own package alone, so ours goes by the name of its own
        Plugins.instance().class_name_to_class[f"{BasicLauncher.__module__}.BasicLauncher"] = QueueLauncher

    def start(engine: Hydra) -> None:
        lines = of_optuna(composed(engine, sweep, arguments, []).hydra.sweeper, sweep, slots, arguments)
        with nullcontext() if launcher == "basic" else safe_children():
            engine.multirun(
                config_name=arguments.config_name or sweep.command,
                task_function=Task(sweep, slots),
                overrides=lines_of(sweep, arguments, lines),
                with_log_configuration=False,
            )

    return watched(sweep, arguments, start)


def lines_of(sweep: Sweep, arguments: Namespace, more: list[str]) -> list[str]:
    """The command line as Hydra gets it."""
    given = [line for line in arguments.overrides if not line.startswith("hydra.sweep.dir=")]
    quoted = str(sweep.folder).replace("\\", "\\\\").replace('"', '\\"')
    return [*given, f'hydra.sweep.dir="{quoted}"', *more]


def composed(engine: Hydra, sweep: Sweep, arguments: Namespace, more: list[str]) -> DictConfig:
    """What Hydra makes of the command line as a whole."""
    return engine.compose_config(
        config_name=arguments.config_name or sweep.command,
        overrides=lines_of(sweep, arguments, more),
        run_mode=RunMode.MULTIRUN,
        with_log_configuration=False,
    )


def of_optuna(sweeper: Any, sweep: Sweep, slots: list[Slot] | None, arguments: Namespace) -> list[str]:
    """What Optuna is told unless the command line does: which way is better, a seed, and how many jobs at once.

    With the seed the same command draws the same jobs and finds the results of those that are finished.
    """
    if "optuna" not in sweeper._target_:
        return []
    import optuna

    optuna.logging.set_verbosity(logging.ERROR)  # the table tells what came of each job
    direction = sweeper.direction
    if OmegaConf.is_list(direction):
        raise ConfigError(
            f"hydra.sweeper.direction is {list(direction)}, but a job has one result, sweep.metric: give one direction"
        )
    wanted = {
        "hydra.sweeper.direction": "minimize" if sweep.settings.lowest else "maximize",
        "hydra.sweeper.n_jobs": 1 if slots is None else len(slots),
    }
    if "seed" in sweeper.sampler:
        wanted["hydra.sweeper.sampler.seed"] = 0
    given = {line.partition("=")[0] for line in arguments.overrides}
    return [f"{key}={value}" for key, value in wanted.items() if key not in given]


def watched(sweep: Sweep, arguments: Namespace, start: Callable[[Hydra], None]) -> tuple[bool, bool]:
    """Start something of Hydra's that returns when all jobs have ended.

    Whatever it raises, the jobs have records, and the table is made from these.
    """
    before = started(sweep)
    with leaving_word(sweep) as received:
        try:
            version.setbase("1.3")  # which hydra.main does; without it jobs change their working directory
            start(engine_of(arguments))
        except (SweepStopped, KeyboardInterrupt):
            return True, False
        except ConfigError:
            raise
        except Exception as error:  # of code we do not know
            if started(sweep) == before:
                raise ConfigError(f"Hydra could not start the sweep: {one_line(error)}") from error
            print(
                f"ssl-{sweep.command}: the sweep ended early: {one_line(error)}. Jobs at work elsewhere go on; the "
                "same command again tells how they stand, and starts what is left",
                file=sys.stderr,
            )
            return bool(received), True
        finally:
            GlobalHydra.instance().clear()
        return bool(received), False


def started(sweep: Sweep) -> dict[str, str | None]:
    """When each job was started last."""
    return {path.stem: read(path).started for path in sweep.records.glob("*.json")}


@contextmanager
def leaving_word(sweep: Sweep) -> Iterator[list[int]]:
    """For the time of a block a signal leaves word in the sweep's folder, which the jobs see wherever they run.

    A second interrupt ends the block at once. Yields the signals that were received.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        (sweep.records / "stop").touch()
        print("stopping: jobs at work save; a second interrupt does not wait for them", flush=True)

    previous = {number: signal.signal(number, receive) for number in handed_on()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
