"""Jobs of a command: submission, messages about a job, and the processes on a node of a job."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sslcli.config.paths import SOURCES_OF_WEIGHTS
from sslcli.config.slurm import SlurmSettings
from sslcli.errors import EXIT_CONFIG, EXIT_INTERRUPTED, ConfigError, print_error, print_unexpected
from sslcli.report.terminal import guard_terminal, print_text
from sslcli.runs.slurm import queue
from sslcli.system import atomic, child_processes

CONFIG = "config.json"  # file name of a job's configuration, unless the job waits for another job of the same run
SCRIPT = "job.sbatch"


def active_job(folder: Path) -> tuple[str, str] | None:
    """Return the ID and the state of the job of a folder, or None if no job of the folder is queued or running."""
    job = queue.submitted_job(folder)
    if job is None:
        return None
    state = queue.state(job, folder / SCRIPT)
    return None if state is None or state in queue.FINAL_STATES else (job, state)


def submit(folder: Path, script: str, config: dict[str, Any], *, name: str = CONFIG, after: str | None = None) -> str:
    """Write the configuration and the script of the job, submit the job, and return its ID.

    Args:
        folder: folder for the files of the job.
        script: text of the batch script.
        config: content of the configuration file. It must be JSON-serializable.
        name: name of the configuration file.
        after: ID of the job that must end before the new job starts.
    """
    atomic.replace(folder / name, json.dumps(config).encode())
    atomic.replace(folder / SCRIPT, script.encode("utf-8", "surrogateescape"))
    job = queue.submit(folder / SCRIPT, after=after)
    atomic.replace(folder / "job_config", f"{name}\n".encode())
    atomic.replace(folder / "job", f"{job}\n".encode())
    with (folder / "history.log").open("a", encoding="utf-8") as history:
        order = "" if after is None else f", starts after job {after}"
        history.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} job {job} submitted{order}\n")
    return job


def warn_if_missing(setting: str, spec: str | None) -> None:
    """Print a warning if `spec` (FILE, run:DIR or timm:NAME, or None) is a file or directory that does not exist here.

    It is no error, because the nodes of the job may have file systems that this machine does not have. `setting` is the
    key of `spec`.
    """
    run, timm = SOURCES_OF_WEIGHTS
    if spec is not None and not spec.startswith(timm) and not os.path.exists(spec.removeprefix(run)):
        warnings.warn(
            f"{setting} is {spec}, but it does not exist on this machine: the job fails unless its nodes have it",
            stacklevel=2,
        )


def print_job(job: str, folder: Path, *, of: Path) -> None:
    """Print the ID of a job and the path `of` that it belongs to, and the commands to follow and to cancel the job."""
    print_text(f"job {job}: {of}")
    print_text(f"  follow it: tail -n +1 -F {folder / f'{job}.log'}")
    print_text(f"  cancel it: scancel {job}")


def wait(job: str, folder: Path, *, command: str) -> int:
    """Print the log of a job until the job ends, and return its exit code. Ctrl-C ends only the printing."""
    try:
        return queue.follow(job, folder / SCRIPT)
    except KeyboardInterrupt:
        print_text(f"\n{command}: job {job} continues in the background; scancel {job} cancels it", to_stderr=True)
        return EXIT_INTERRUPTED


def check_gpus(settings: SlurmSettings, device: str, *, action: str) -> None:
    """Raise ConfigError if this node has fewer GPUs than launcher.gpus_per_node, unless `device` is "cpu".

    `action` is the verb of the remedy, such as "train".
    """
    import torch

    if device != "cpu" and torch.cuda.device_count() < settings.gpus_per_node:
        raise ConfigError(
            f"launcher.gpus_per_node is {settings.gpus_per_node}, but torch sees {torch.cuda.device_count()} GPUs on "
            f"{os.uname().nodename}: check launcher.setup and the build of torch, or {action} with device=cpu"
        )


def run_processes_of_node(
    module: str, path: Path, settings: SlurmSettings, endpoint: str, *, on_message: Callable[[str], None]
) -> int:
    """Run `python -m MODULE PATH` in the processes of this node of the job, and return one exit code for all.

    `endpoint` is HOST:PORT of the rendezvous of all nodes. `on_message` is an argument of `run_processes`.
    """
    from sslcli.distributed.elastic import Rendezvous, run_processes

    rendezvous = Rendezvous(
        name=f"{os.environ['SLURM_JOB_ID']}-{endpoint}",
        nodes=settings.nodes,
        node=int(os.environ["SLURM_NODEID"]),
        endpoint=endpoint,
    )
    return run_processes(
        [*child_processes.arguments(module), str(path)],
        processes=settings.processes,
        max_restarts=0,  # a single node is never restarted; the batch script restarts all nodes
        on_message=on_message,
        rendezvous=rendezvous,
    )


def check_endpoint(text: str) -> None:
    """Raise ConfigError unless `text` is HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"the endpoint is {text!r}, but it must be HOST:PORT with a port of 1 to 65535")


def main(module: str, command: str, run_node: Callable[[Path, str], int]) -> None:
    """Run the processes of one node of a job: `python -m MODULE CONFIG.json HOST:PORT`.

    The exit code of this process is the result of `run_node(path, endpoint)`. `command` is "train" or "eval".
    """
    guard_terminal()
    try:
        config, endpoint = child_processes.given_arguments(
            module,
            "CONFIG.json",
            "HOST:PORT",
            launcher="slurm",
            variables=["SLURM_JOB_ID", "SLURM_NODEID"],
            command=f"ssl-{command}",
        )
        check_endpoint(endpoint)
    except ConfigError as error:
        print_error(command, error)
        sys.exit(EXIT_CONFIG)
    path = Path(config)
    try:
        code = run_node(path, endpoint)
    except ConfigError as error:
        print_error(command, error)
        code = EXIT_CONFIG
    except Exception as error:
        code = print_unexpected(command, error)
    with suppress(OSError):  # job.sh then uses the exit code of srun
        (path.parent / "codes" / os.environ["SLURM_NODEID"]).write_text(f"{code}\n", encoding="utf-8")
    sys.exit(code)
