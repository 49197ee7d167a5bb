"""Batch script of a run, rendered from the settings of the launcher."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path

from sslcli.config.slurm import SlurmSettings, time_limit
from sslcli.engine import checkpoint_names
from sslcli.system import child_processes


def render(settings: SlurmSettings, *, folder: Path, config: Path, cwd: Path, python: str) -> str:
    """Return the text of the batch script.

    Args:
        settings: the settings of the launcher.
        folder: folder for the script, its logs and its history. It is inside the run directory.
        config: file with the configuration of the run. The job reads it at every start.
        cwd: working directory of the run.
        python: interpreter to use if launcher.python is null.
    """
    start = child_processes.arguments("sslcli.runs.slurm_job", ours=settings.python is None)
    agent = shlex.join([settings.python or python, *start, str(config)])
    step = ["srun", f"--nodes={settings.nodes}", f"--ntasks={settings.nodes}", "--ntasks-per-node=1", "--wait=60"]
    if settings.cpus_per_node:
        step.append(f"--cpus-per-task={settings.cpus_per_node}")  # since Slurm 22.05, srun does not inherit it
    lines = [
        "#!/bin/bash",
        *directives(settings, folder=folder, cwd=cwd),
        "",
        "# Written by ssl-train launcher=slurm. It needs nothing but this folder and the installed sslcli.",
        f"folder={shlex.quote(str(folder))}",
        f"warning={settings.warning}  # seconds between the signal and the time limit",
        f"max_restarts={settings.max_restarts}",
        f"checkpoints={shlex.quote(str(checkpoint_names.folder(folder.parent)))}",
        f"checkpoint_pattern={shlex.quote(checkpoint_names.PATTERN)}",
        f"agent=({agent})",
        f"step=({shlex.join(step)})",
        "prepare() {",
        settings.setup or ":",
        "}",
        "",
        files("sslcli.runs.slurm").joinpath("job.sh").read_text(encoding="utf-8"),
    ]
    return "\n".join(lines)


def directives(settings: SlurmSettings, *, folder: Path, cwd: Path) -> list[str]:
    """Return the #SBATCH lines of the batch script. See `render` for the arguments."""
    limit = time_limit("launcher.time", settings.time)
    gpus = f"{settings.gpu_type}:{settings.gpus_per_node}" if settings.gpu_type else settings.gpus_per_node
    values = {
        "job-name": f"ssl-{folder.parent.name}",
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
    given = [f"--{name}={shlex.quote(str(value))}" for name, value in values.items() if value is not None]
    return [f"#SBATCH {line}" for line in [*given, "--requeue", *settings.extra]]


def as_slurm_writes(duration: int) -> str:
    """Return a duration in seconds as D-HH:MM:SS."""
    minutes, rest = divmod(duration, 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:{rest:02d}"
