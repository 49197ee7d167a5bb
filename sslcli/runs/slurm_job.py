"""launcher=slurm of ssl-train: submission of a run from a login node, and its execution on each node of the job."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from sslcli.config.added import with_added_keys
from sslcli.config.comparison import changed_settings
from sslcli.config.moved import current_config
from sslcli.config.run_config import RunConfig
from sslcli.config.slurm import SlurmSettings
from sslcli.engine import checkpoint_names
from sslcli.engine.phases import LENGTH_KEYS
from sslcli.errors import ConfigError, disk_failure, print_error
from sslcli.report.terminal import log_and_print, print_text
from sslcli.runs import directory
from sslcli.runs.slurm import job, queue
from sslcli.runs.slurm.script import Command, render
from sslcli.system import child_processes
from sslcli.system.locks import locked
from sslcli.system.stored import DamagedFile, read_json, read_line


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
        print_text(script_of(config, queue.slurm_dir(run_dir) / job.CONFIG).rstrip("\n"))
        return 0
    directory.check_resumable(run_dir, config.values)
    if config.resume != "never" and directory.is_complete(run_dir, config.values):
        print_text(f"this run is finished already: {run_dir}")
        return 0
    if not checkpoint_names.all_of(run_dir):  # a run with a checkpoint resumes without init
        job.warn_if_missing("init", config.init)
    job.warn_if_missing("teacher", config.teacher)
    try:
        job_id = submit_once(run_dir, config)
    except OSError as error:
        failure = disk_failure(error, run_dir, "run_dir")
        if failure is None:
            raise
        print_error("train", failure[0])
        return failure[1]
    job.print_job(job_id, queue.slurm_dir(run_dir), of=run_dir)
    return job.wait(job_id, queue.slurm_dir(run_dir), command="ssl-train") if settings.wait else 0


def submit_once(run_dir: Path, config: RunConfig) -> str:
    """Return the ID of the job that trains the run to the length of `config`. Submit the job if there is none."""
    folder = queue.slurm_dir(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir is {run_dir}, but it cannot be written ({error.strerror}): choose another"
        ) from error
    with locked(folder / "submit.lock"):
        active = job.active_job(folder)
        if active is None:
            with directory.lock(run_dir):  # fails if the run trains on this machine
                return job.submit(folder, script_of(config, folder / job.CONFIG), config.plain())
        earlier, state = active
        if not is_longer(config, folder / config_name(folder), earlier):
            print_text(f"job {earlier} is {state} for this run already")
            return earlier
        print_text(
            f"job {earlier} is {state} with a shorter length: the next job extends the run after job {earlier} has "
            "ended"
        )
        # Slurm may requeue the active job, which then reads its own configuration again.
        name = f"config-after-{earlier}.json"
        return job.submit(folder, script_of(config, folder / name), config.plain(), name=name, after=earlier)


def config_name(folder: Path) -> str:
    """Return the name of the file with the configuration of a run's newest Slurm job.

    `folder` is the result of `queue.slurm_dir` for the run. The file `job_config` in `folder` stores the name. Raises
    DamagedFile if the stored name is damaged.
    """
    name = read_line(
        folder / "job_config",
        rf"config(-after-{queue.JOB_ID})?\.json",
        what="the name of a configuration",
        remedy=queue.CHECK_JOBS,
    )
    return job.CONFIG if name is None else name


def is_longer(config: RunConfig, path: Path, active: str) -> bool:
    """Return True if `config` requests a longer run than an active job, and False if both lengths are equal.

    The length is `train.max_steps`, or `train.epochs` if `train.max_steps` is not set. `path` is the configuration file
    of the job `active`. If the file does not exist, the result is False. If one length is in steps and the other in
    epochs, they cannot be compared, and the result is True.

    Raises ConfigError if `config` requests a shorter run, or if another setting that affects the results differs.
    """
    if not path.exists():
        return False
    earlier = stored_config(path)
    changed = changed_settings(earlier.values, config.values, may_differ=LENGTH_KEYS)
    shorter = f"train.epochs and train.max_steps are smaller than those of job {active}, and a run cannot be shortened"
    if changed:
        raise ConfigError(
            f"job {active} trains the run in {config.run_dir} with another configuration; what differs: "
            f"{'; '.join(changed)}. Use the same values, choose another run_dir, or cancel the job: scancel {active}"
        )
    one, other = ((each.train.max_steps, each.train.epochs) for each in (earlier, config))
    if one == other or (one[0] is not None and one[0] == other[0]):
        return False
    # The lengths are comparable if both are in steps, or both in epochs.
    if (one[0] is None) == (other[0] is None) and (other[0] or other[1]) < (one[0] or one[1]):
        raise ConfigError(f"{shorter}: use its values, or cancel the job: scancel {active}")
    return True


def script_of(config: RunConfig, path: Path) -> str:
    """Return the batch script of a run with the configuration file `path`."""
    assert isinstance(config.launcher, SlurmSettings)
    return render(
        config.launcher,
        command_of(config.directory),
        folder=path.parent,
        config=path,
        cwd=Path.cwd(),
        python=sys.executable,
    )


def command_of(run_dir: Path) -> Command:
    """Return what the job of a run executes."""
    folder, pattern = shlex.quote(str(checkpoint_names.folder(run_dir))), shlex.quote(checkpoint_names.PATTERN)
    return Command(
        name="ssl-train",
        module="sslcli.runs.slurm_job",
        job_name=f"ssl-{run_dir.name}",
        saved=f"ls {folder} 2>/dev/null | grep -xE {pattern}",
        progress="checkpoint",
        restarts_from="the last checkpoint",
    )


def run_node(path: Path, endpoint: str) -> int:
    """Start the processes of this node of the job, and return their exit code.

    `path` is the configuration of the job, and `endpoint` is HOST:PORT of the rendezvous of all nodes. Raises
    ConfigError if this node has fewer GPUs than launcher.gpus_per_node.
    """
    config = stored_config(path)
    settings = config.launcher
    assert isinstance(settings, SlurmSettings)
    job.check_gpus(settings, config.device, action="train")
    if settings.nodes * settings.processes == 1:
        child_processes.find_trusted(config.trust)
        from sslcli.runs.worker import run

        return run(config)
    on_message = partial(log_and_print, config.directory)
    return job.run_processes_of_node("sslcli.runs.launch", path, settings, endpoint, on_message=on_message)


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


if __name__ == "__main__":
    job.main("sslcli.runs.slurm_job", "train", run_node)
