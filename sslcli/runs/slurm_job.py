"""launcher=slurm: submission of a run from a login node, and its execution on each node of the job."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from sslcli.config.added import with_added_keys
from sslcli.config.comparison import changed_settings
from sslcli.config.moved import current_config
from sslcli.config.run_config import RunConfig
from sslcli.config.slurm import SlurmSettings
from sslcli.engine.phases import LENGTH_KEYS
from sslcli.errors import EXIT_CONFIG, EXIT_INTERRUPTED, ConfigError, disk_failure, print_error, print_unexpected
from sslcli.report.terminal import guard_terminal, log_and_print, print_text
from sslcli.runs import directory
from sslcli.runs.slurm import queue
from sslcli.runs.slurm.script import render
from sslcli.system import atomic, child_processes
from sslcli.system.locks import locked
from sslcli.system.stored import DamagedFile, read_json, read_line

CONFIG = "config.json"  # file name of a job's configuration, unless the job waits for another job of the same run


def launch(config: RunConfig) -> int:
    """Submit a run unless its job is already queued or running, and return the exit code.

    If the run's job is already queued or running, but was submitted with fewer steps than `config` requests, a second
    job is submitted. The second job extends the run after the first job has ended.

    `config.run_dir` must be absolute. If launcher.wait is true, this function prints the log until the job ends, and
    returns the exit code of the job. Raises ConfigError if the run cannot start or Slurm rejects the job.
    """
    run_dir, settings = config.directory, config.launcher
    assert isinstance(settings, SlurmSettings)
    if config.dry_run:
        print_text(script_of(config, slurm_dir(run_dir) / CONFIG).rstrip("\n"))
        return 0
    directory.check_resumable(run_dir, config.values)
    if config.resume != "never" and directory.is_complete(run_dir, config.values):
        print_text(f"this run is finished already: {run_dir}")
        return 0
    try:
        job = submit_once(run_dir, config)
    except OSError as error:
        failure = disk_failure(error, run_dir, "run_dir")
        if failure is None:
            raise
        print_error("train", failure[0])
        return failure[1]
    print_job(job, run_dir)
    return wait(job, run_dir) if settings.wait else 0


def submit_once(run_dir: Path, config: RunConfig) -> str:
    """Return the ID of the job that trains the run to the length of `config`. Submit the job if there is none."""
    folder = slurm_dir(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir is {run_dir}, but it cannot be written ({error.strerror}): choose another"
        ) from error
    with locked(folder / "submit.lock"):
        active = active_job(run_dir)
        if active is None:
            with directory.lock(run_dir):  # fails if the run trains on this machine
                return submit(run_dir, config, CONFIG)
        job, state = active
        if not is_longer(config, folder / config_name(folder), job):
            print_text(f"job {job} is {state} for this run already")
            return job
        print_text(
            f"job {job} is {state} with a shorter length: the next job extends the run after job {job} has ended"
        )
        # Slurm may requeue the active job, which then reads its own configuration again.
        return submit(run_dir, config, f"config-after-{job}.json", after=job)


def config_name(folder: Path) -> str:
    """Return the name of the file with the configuration of a run's newest Slurm job.

    `folder` is the result of `slurm_dir` for the run. The file `job_config` in `folder` stores the name. Raises
    DamagedFile if the stored name is damaged.
    """
    name = read_line(
        folder / "job_config",
        rf"config(-after-{queue.JOB_ID})?\.json",
        what="the name of a configuration",
        remedy=queue.CHECK_JOBS,
    )
    return CONFIG if name is None else name


def is_longer(config: RunConfig, path: Path, job: str) -> bool:
    """Return True if `config` requests a longer run than an active job, and False if both lengths are equal.

    The length is `train.max_steps`, or `train.epochs` if `train.max_steps` is not set. `path` is the configuration file
    of the job, and `job` is its ID. If the file does not exist, the result is False. If one length is in steps and the
    other in epochs, they cannot be compared, and the result is True.

    Raises ConfigError if `config` requests a shorter run, or if another setting that affects the results differs.
    """
    if not path.exists():
        return False
    active = stored_config(path)
    changed = changed_settings(active.values, config.values, may_differ=LENGTH_KEYS)
    shorter = f"train.epochs and train.max_steps are smaller than those of job {job}, and a run cannot be shortened"
    if changed:
        raise ConfigError(
            f"job {job} trains the run in {config.run_dir} with another configuration; what differs: "
            f"{'; '.join(changed)}. Use the same values, choose another run_dir, or cancel the job: scancel {job}"
        )
    one, other = ((each.train.max_steps, each.train.epochs) for each in (active, config))
    if one == other or (one[0] is not None and one[0] == other[0]):
        return False
    # The lengths are comparable if both are in steps, or both in epochs.
    if (one[0] is None) == (other[0] is None) and (other[0] or other[1]) < (one[0] or one[1]):
        raise ConfigError(f"{shorter}: use its values, or cancel the job: scancel {job}")
    return True


def script_of(config: RunConfig, path: Path) -> str:
    """Return the batch script of a run with the configuration file `path`."""
    assert isinstance(config.launcher, SlurmSettings)
    return render(config.launcher, folder=path.parent, config=path, cwd=Path.cwd(), python=sys.executable)


def slurm_dir(run_dir: Path) -> Path:
    """Return the folder for the script, the logs and the history of a run's jobs."""
    return run_dir / "slurm"


def active_job(run_dir: Path) -> tuple[str, str] | None:
    """Return the ID and the state of the Slurm job of a run, or None if the run has no queued or running job."""
    job = queue.submitted_job(run_dir)
    if job is None:
        return None
    state = queue.state(job, slurm_dir(run_dir) / "job.sbatch")
    return None if state is None or state in queue.FINAL_STATES else (job, state)


def submit(run_dir: Path, config: RunConfig, name: str, *, after: str | None = None) -> str:
    """Write the configuration and the script of the job, submit the job, and return its ID.

    Args:
        run_dir: run directory.
        config: configuration of the run.
        name: name of the file for the configuration.
        after: ID of the job that must end before the new job starts.
    """
    folder = slurm_dir(run_dir)
    text = script_of(config, folder / name)
    atomic.replace(folder / name, json.dumps(config.plain()).encode())
    atomic.replace(folder / "job.sbatch", text.encode("utf-8", "surrogateescape"))
    job = queue.submit(folder / "job.sbatch", after=after)
    atomic.replace(folder / "job_config", f"{name}\n".encode())
    atomic.replace(folder / "job", f"{job}\n".encode())
    with (folder / "history.log").open("a", encoding="utf-8") as history:
        order = "" if after is None else f", starts after job {after}"
        history.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} job {job} submitted{order}\n")
    return job


def print_job(job: str, run_dir: Path) -> None:
    """Print the ID and the run directory of a job, and the commands to follow and to cancel the job."""
    print_text(f"job {job}: {run_dir}")
    print_text(f"  follow it: tail -n +1 -F {slurm_dir(run_dir) / f'{job}.log'}")
    print_text(f"  cancel it: scancel {job}")


def wait(job: str, run_dir: Path) -> int:
    """Print the log of a job until the job ends, and return its exit code. Ctrl-C ends only the printing."""
    try:
        return queue.follow(job, slurm_dir(run_dir) / "job.sbatch")
    except KeyboardInterrupt:
        print_text(f"\nssl-train: job {job} continues in the background; scancel {job} cancels it", to_stderr=True)
        return EXIT_INTERRUPTED


def run_node(path: Path, endpoint: str) -> int:
    """Start the processes of this node of the job, and return their exit code.

    `path` is the configuration of the job, and `endpoint` is HOST:PORT of the rendezvous of all nodes. Raises
    ConfigError if this node has fewer GPUs than launcher.gpus_per_node.
    """
    import torch

    from sslcli.distributed.elastic import Rendezvous, run_processes

    config = stored_config(path)
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
    return run_processes(
        [*child_processes.arguments("sslcli.runs.launch"), str(path)],
        processes=settings.processes,
        max_restarts=0,  # a single node is never restarted; the batch script restarts all nodes
        on_message=partial(log_and_print, config.directory),
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


def check_endpoint(text: str) -> None:
    """Raise ConfigError unless `text` is HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"the endpoint is {text!r}, but it must be HOST:PORT with a port of 1 to 65535")


def main() -> None:
    """Run the training processes of one node of a Slurm job.

    The command is `python -m sslcli.runs.slurm_job CONFIG.json HOST:PORT`.
    """
    guard_terminal()
    try:
        config, endpoint = child_processes.given_arguments(
            "sslcli.runs.slurm_job",
            "CONFIG.json",
            "HOST:PORT",
            launcher="slurm",
            variables=["SLURM_JOB_ID", "SLURM_NODEID"],
        )
        check_endpoint(endpoint)
    except ConfigError as error:
        print_error("train", error)
        sys.exit(EXIT_CONFIG)
    path = Path(config)
    try:
        code = run_node(path, endpoint)
    except ConfigError as error:
        print_error("train", error)
        code = EXIT_CONFIG
    except Exception as error:
        code = print_unexpected("train", error)
    with suppress(OSError):  # job.sh then uses the exit code of srun
        (path.parent / "codes" / os.environ["SLURM_NODEID"]).write_text(f"{code}\n", encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
