"""`--multirun`: every job is a process of its own, so that no job leaves a trace in the next.

Hydra's sweeper decides the jobs and its launcher where they start; the job itself is the same command with the job's
own overrides and a run directory inside the sweep's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sslcli.cli._compose import digested
from sslcli.cli._launch import default_name

MODULES = {"train": "sslcli.cli.train", "eval": "sslcli.cli.eval"}


def sweep(
    name: str, jobs: list[dict[str, Any]], arguments: Any, hand_over: Callable[[str, Callable[[DictConfig], Any]], None]
) -> int:
    """Run the checked jobs of a command through Hydra; the worst exit code of those that ran in this process."""
    where = next((line for line in arguments.overrides if line.startswith("hydra.sweep.dir=")), None)
    if where is None:
        sys.argv.append(f"hydra.sweep.dir=runs/sweep_{digested(arguments.overrides) or 'default'}")
    print(f"{len(jobs)} jobs", flush=True)
    results: list[tuple[str, int, float | None]] = []

    def job(config: DictConfig) -> float | None:
        overrides = list(HydraConfig.get().overrides.task)
        folder = None
        line = [sys.executable, "-m", MODULES[name], *passed_on(arguments), *overrides]
        if name == "train":
            folder = Path(HydraConfig.get().sweep.dir).absolute() / job_name(overrides)
            line = [*line, f"run_dir={folder}"] if not any(o.startswith("run_dir=") for o in overrides) else line
        title = " ".join(overrides) or "defaults"
        print(f"\n=== {title}", flush=True)
        code = subprocess.run(line, check=False).returncode
        score = None if folder is None else knn_of(folder)
        results.append((title, code, score))
        return score

    hand_over(name, job)
    print("\nexit  k-NN    job")
    for title, code, score in results:
        print(f"{code:4d}  {'-' if score is None else f'{100 * score:.1f} %':6s}  {title}")
    return max((code for _, code, _ in results), default=0)


def job_name(overrides: list[str]) -> str:
    """The name of a job's run directory, the one the same overrides would have alone."""
    choices = HydraConfig.get().runtime.choices
    return default_name({"_choices_": choices, "_overrides_": digested(overrides)})


def passed_on(arguments: Any) -> list[str]:
    """Flags of the command line that a job needs as well."""
    flags = []
    for flag in ("config_dir", "config_path", "config_name"):
        value = getattr(arguments, flag)
        if value is not None:
            value = value if flag == "config_name" else os.path.abspath(value)
            flags += [f"--{flag.replace('_', '-')}", value]
    return flags


def knn_of(run_dir: Path) -> float | None:
    """The newest k-NN accuracy of a run, which sweepers that optimise maximise."""
    from sslcli.report.metrics import newest

    return newest(run_dir / "metrics.jsonl", "monitor/knn_top1")
