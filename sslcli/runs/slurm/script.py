"""Batch script of a job, rendered from the settings of the launcher."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sslcli.config.slurm import SlurmSettings, time_limit
from sslcli.system import child_processes


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command whose work a job does, and how the job can be continued.

    Attributes:
        name: the console script, such as ssl-train.
        module: module that does the work on one node. Its arguments are the configuration and the rendezvous.
        job_name: name of the job.
        saved: shell command that prints the names of the files from which a new attempt of the job continues.
        progress: what these files contain, for messages.
        restarts_from: where restarted processes continue, for messages.
    """

    name: str
    module: str
    job_name: str
    saved: str
    progress: str
    restarts_from: str


def render(settings: SlurmSettings, command: Command, *, folder: Path, config: Path, cwd: Path, python: str) -> str:
    """Return the text of the batch script.

    Args:
        settings: the settings of the launcher.
        command: what the job runs.
        folder: folder for the script, its logs and its history.
        config: file with the configuration. The job reads it at every start.
        cwd: working directory of the job.
        python: interpreter to use if launcher.python is null.
    """
    start = child_processes.arguments(command.module, ours=settings.python is None)
    agent = shlex.join([settings.python or python, *start, str(config)])
    step = ["srun", f"--nodes={settings.nodes}", f"--ntasks={settings.nodes}", "--ntasks-per-node=1", "--wait=60"]
    if settings.cpus_per_node:
        step.append(f"--cpus-per-task={settings.cpus_per_node}")  # since Slurm 22.05, srun does not inherit it
    lines = [
        "#!/bin/bash",
        *directives(settings, name=command.job_name, folder=folder, cwd=cwd),
        "",
        f"# Written by {command.name} launcher=slurm. It needs nothing but this folder and the installed sslcli.",
        f"folder={shlex.quote(str(folder))}",
        f"warning={settings.warning}  # seconds between the signal and the time limit",
        f"max_restarts={settings.max_restarts}",
        f"progress={shlex.quote(command.progress)}",
        f"restarts_from={shlex.quote(command.restarts_from)}",
        f"saved() {{ {command.saved}; }}",
        f"agent=({agent})",
        f"step=({shlex.join(step)})",
        "prepare() {",
        settings.setup or ":",
        "}",
        "",
        files("sslcli.runs.slurm").joinpath("job.sh").read_text(encoding="utf-8"),
    ]
    return "\n".join(lines)


def directives(settings: SlurmSettings, *, name: str, folder: Path, cwd: Path) -> list[str]:
    """Return the #SBATCH lines of the batch script. `name` is the name of the job; see `render` for the others."""
    limit = time_limit("launcher.time", settings.time)
    gpus = f"{settings.gpu_type}:{settings.gpus_per_node}" if settings.gpu_type else settings.gpus_per_node
    values = {
        "job-name": name,
        "chdir": cwd,
        "output": f"{str(folder).replace('%', '%%')}/%j.log",
        "open-mode": "append",
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": settings.cpus_per_node,
        "gpus-per-node": gpus or None,
        "mem": settings.memory,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": None if limit is None else as_slurm_writes(limit),
        "signal": f"B:USR1@{settings.warning}",
    }
    given = [f"--{key}={shlex.quote(str(value))}" for key, value in values.items() if value is not None]
    return [f"#SBATCH {line}" for line in [*given, "--requeue", *settings.extra]]


def as_slurm_writes(duration: int) -> str:
    """Return a duration in seconds as D-HH:MM:SS."""
    minutes, rest = divmod(duration, 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:{rest:02d}"
