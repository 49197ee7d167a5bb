"""launcher=slurm: submission of a run from a login node, and its execution on each node of the job."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from sslcli.config.added import with_added_keys
from sslcli.config.moved import current_config
from sslcli.config.run_config import RunConfig
from sslcli.config.slurm import SlurmSettings
from sslcli.errors import EXIT_CONFIG, EXIT_INTERRUPTED, ConfigError, disk_failure, print_error
from sslcli.report.terminal import guard_terminal, log_and_print, print_text
from sslcli.runs import directory
from sslcli.runs.slurm import queue
from sslcli.runs.slurm.script import render
from sslcli.system import atomic, child_processes
from sslcli.system.stored import DamagedFile, read_json


def launch(config: RunConfig) -> int:
    """Submit a run unless its job is already queued or running, and return the exit code.

    `config.run_dir` must be absolute. If launcher.wait is true, this function prints the log until the job ends, and
    returns the exit code of the job. Raises ConfigError if the run cannot start or Slurm rejects the job.
    """
    run_dir, settings = config.directory, config.launcher
    assert isinstance(settings, SlurmSettings)
    text = render(settings, folder=slurm_dir(run_dir), cwd=Path.cwd(), python=sys.executable)
    if config.dry_run:
        print_text(text.rstrip("\n"))
        return 0
    directory.check_resumable(run_dir, config.values)
    if config.resume != "never" and directory.is_complete(run_dir, config.values):
        print_text(f"this run is finished already: {run_dir}")
        return 0
    job = active_job(run_dir)
    if job is not None:
        print_text(f"job {job[0]} is {job[1]} for this run already")
    else:
        try:
            with directory.lock(run_dir):
                job = active_job(run_dir)  # check again, now that no other process can submit the run
                job = job or (submit(run_dir, config, text), "submitted")
        except OSError as error:
            failure = disk_failure(error, run_dir, "run_dir")
            if failure is None:
                raise
            print_error("train", failure[0])
            return failure[1]
    print_job(job[0], run_dir)
    return wait(job[0], run_dir) if settings.wait else 0


def slurm_dir(run_dir: Path) -> Path:
    """Return the folder for the script, the logs and the history of a run's jobs."""
    return run_dir / "slurm"


def active_job(run_dir: Path) -> tuple[str, str] | None:
    """Return the ID and the state of the run's job, or None if no job is queued or running."""
    job = queue.submitted_job(run_dir)
    if job is None:
        return None
    state = queue.state(job, slurm_dir(run_dir) / "job.sbatch")
    return None if state is None or state in queue.FINAL_STATES else (job, state)


def submit(run_dir: Path, config: RunConfig, text: str) -> str:
    """Write the configuration and the script of the job, submit the job, and return its ID."""
    folder = slurm_dir(run_dir)
    folder.mkdir(exist_ok=True)
    atomic.replace(folder / "config.json", json.dumps(config.plain()).encode())
    atomic.replace(folder / "job.sbatch", text.encode("utf-8", "surrogateescape"))
    job = queue.submit(folder / "job.sbatch")
    atomic.replace(folder / "job", f"{job}\n".encode())
    with (folder / "history.log").open("a", encoding="utf-8") as history:
        history.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} job {job} submitted\n")
    return job


def print_job(job: str, run_dir: Path) -> None:
    """Print the ID and the run directory of a job, and the commands to follow and to cancel the job."""
    print_text(f"job {job}: {run_dir}")
    print_text(f"  follow it: tail -n +1 -F {slurm_dir(run_dir) / f'{job}.log'}")
    print_text(f"  cancel it: scancel {job}")


def wait(job: str, run_dir: Path) -> int:
    """Print the log of a job until it ends, and return its exit code."""
    try:
        return queue.follow(job, slurm_dir(run_dir) / "job.sbatch")
    except KeyboardInterrupt:
        print_text(f"\nssl-train: job {job} continues in the background; scancel {job} cancels it", to_stderr=True)
        return EXIT_INTERRUPTED


def run_node(config: RunConfig, endpoint: str) -> int:
    """Start the processes of this node of the job, and return their exit code.

    `endpoint` is HOST:PORT of the rendezvous of all nodes. Raises ConfigError if this node has fewer GPUs than
    launcher.gpus_per_node.
    """
    import torch

    from sslcli.distributed.elastic import Rendezvous, run_processes

    settings = config.launcher
    assert isinstance(settings, SlurmSettings)
    if config.device != "cpu" and torch.cuda.device_count() < settings.gpus_per_node:
        raise ConfigError(
            f"launcher.gpus_per_node is {settings.gpus_per_node}, but torch sees {torch.cuda.device_count()} GPUs on "
            f"{os.uname().nodename}: check launcher.setup and the build of torch, or train with device=cpu"
        )
    if settings.nodes * settings.processes == 1:
        child_processes.find_trusted(config.trust)
        from sslcli.runs.worker import run

        return run(config)
    rendezvous = Rendezvous(
        name=f"{os.environ['SLURM_JOB_ID']}-{endpoint}",
        nodes=settings.nodes,
        node=int(os.environ["SLURM_NODEID"]),
        endpoint=endpoint,
    )
    run_dir = config.directory
    return run_processes(
        [*child_processes.arguments("sslcli.runs.launch"), str(slurm_dir(run_dir) / "config.json")],
        processes=settings.processes,
        max_restarts=0,  # a single node is never restarted; the batch script restarts all nodes
        on_message=partial(log_and_print, run_dir),
        rendezvous=rendezvous,
    )


class StoredRunConfig(TypedDict):
    """Required keys of config.json, which are the keys of `RunConfig.plain`."""

    run_dir: str
    train: dict[str, Any]
    monitor: dict[str, Any]
    launcher: dict[str, Any]
    method: dict[str, Any]
    dataset: dict[str, Any]
    backbone: dict[str, Any]
    views: dict[str, Any]
    optimizer: dict[str, Any]
    _choices_: dict[str, Any]
    _overrides_: str
    _lines_: list[str]


def stored_config(path: Path) -> RunConfig:
    """Return the configuration that `submit` wrote. Raises ConfigError if the file is missing or damaged."""
    remedy = "run the same ssl-train command again"
    try:
        plain: dict[str, Any] = dict(read_json(path, StoredRunConfig, remedy=remedy))
        config = current_config(plain)[0]
        config["dataset"] = with_added_keys(config["dataset"])  # an older version may have submitted the job
        return RunConfig.from_plain(config)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {path}: {remedy}") from error
    except (KeyError, TypeError) as error:
        raise DamagedFile(path, f"its settings are not those of ssl-train: {error}", remedy) from error


def main() -> None:
    """Run one node of a job: `python -m sslcli.runs.slurm_job CONFIG.json HOST:PORT`."""
    guard_terminal()
    path = Path(sys.argv[1])
    try:
        code = run_node(stored_config(path), sys.argv[2])
    except ConfigError as error:
        print_error("train", error)
        code = EXIT_CONFIG
    (path.parent / "codes" / os.environ["SLURM_NODEID"]).write_text(f"{code}\n", encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
