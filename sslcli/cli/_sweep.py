"""`--multirun`: every job is a process of its own, so that no job leaves a trace in the next.

Hydra's sweeper decides the jobs and its launcher where they start; the job itself is the same command with the job's
own overrides and a run directory inside the sweep's.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sslcli.cli._compose import digested, flags_of, hand_over
from sslcli.cli._launch import default_name
from sslcli.errors import EXIT_STOPPED, ConfigError

MODULES = {"train": "sslcli.cli.train", "eval": "sslcli.cli.eval"}
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a job that gets one saves and stops


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    title: str
    code: int | None  # None: not started, because the sweep was stopped before
    knn: float | None


def sweep(name: str, jobs: list[dict[str, Any]], arguments: Namespace) -> int:
    """Run the checked jobs of a command through Hydra; the worst exit code of those that ran in this process."""
    check_directories(jobs)
    folder = next((o.partition("=")[2] for o in arguments.overrides if o.startswith("hydra.sweep.dir=")), None)
    if folder is None:
        folder = f"runs/sweep_{digested(arguments.overrides) or 'default'}"
        arguments.overrides = [*arguments.overrides, f"hydra.sweep.dir={folder}"]
    print(f"{len(jobs)} jobs", flush=True)
    stopped_by: list[int] = []
    outcomes: list[Outcome] = []
    hand_over(name, job_of(name, arguments, outcomes, stopped_by), arguments)
    print_table(outcomes)
    if name == "train":
        print(f"to compare them: ssl-eval run={folder}")
    if stopped_by:
        return EXIT_STOPPED
    return max((abs(outcome.code or 0) for outcome in outcomes), default=0)


def check_directories(jobs: list[dict[str, Any]]) -> None:
    """Raise ConfigError where several jobs would share a run directory."""
    given = [job["run_dir"] for job in jobs if job.get("run_dir") is not None]
    if len(set(given)) < len(given):
        raise ConfigError(
            f"run_dir is {given[0]!r} for several jobs: give hydra.sweep.dir={given[0]} in its place, and each job "
            "gets a directory in it"
        )


def job_of(
    name: str, arguments: Namespace, outcomes: list[Outcome], stopped_by: list[int]
) -> Callable[[DictConfig], float | None]:
    """What Hydra calls for each job: runs it, notes its outcome, gives its k-NN accuracy to sweepers that optimise."""
    flags = flags_of(arguments, only=("config_dir", "config_path", "config_name"))

    def job(config: DictConfig) -> float | None:
        overrides = list(HydraConfig.get().overrides.task)
        title = " ".join(overrides) or "defaults"
        if stopped_by:
            outcomes.append(Outcome(title, None, None))
            return None
        line, run_dir = [sys.executable, "-m", MODULES[name], *flags, *overrides], None
        if name == "train":
            run_dir = Path(HydraConfig.get().sweep.dir).absolute() / job_name(overrides)
            if not any(override.startswith("run_dir=") for override in overrides):
                line.append(f'run_dir="{run_dir}"')
        print(f"\n=== {title}", flush=True)
        code = run_process(line, stopped_by)
        outcomes.append(Outcome(title, code, None if run_dir is None else knn_of(run_dir)))
        return outcomes[-1].knn

    return job


def run_process(line: list[str], stopped_by: list[int]) -> int:
    """Run a process to its end and return its exit code; signals are handed on to it, and noted."""
    process = subprocess.Popen(line)

    def receive(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)
        process.send_signal(number)

    previous = {number: signal.signal(number, receive) for number in HANDED_ON}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def print_table(outcomes: list[Outcome]) -> None:
    """Exit code and k-NN accuracy of every job."""
    print("\nexit  k-NN    job")
    for outcome in outcomes:
        code = "-" if outcome.code is None else str(outcome.code)
        knn = "-" if outcome.knn is None else f"{100 * outcome.knn:.1f} %"
        print(f"{code:>4s}  {knn:6s}  {outcome.title}{'  (not started)' if outcome.code is None else ''}")


def job_name(overrides: list[str]) -> str:
    """The name of a job's run directory, the one the same overrides would have alone."""
    choices = HydraConfig.get().runtime.choices
    return default_name({"_choices_": choices, "_overrides_": digested(overrides)})


def knn_of(run_dir: Path) -> float | None:
    """The newest k-NN accuracy of a run."""
    from sslcli.report.metrics import newest

    return newest(run_dir / "metrics.jsonl", "monitor/knn_top1")
