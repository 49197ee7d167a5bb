"""Launch of a training run: in this process, in several processes of this node, or as a Slurm job."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sslcli.config.added import resumed_dataset
from sslcli.config.class_defaults import resumed_config
from sslcli.config.run_config import RunConfig, keys_of
from sslcli.config.settings import LauncherSettings, MultiSettings
from sslcli.engine import checkpoint_names
from sslcli.errors import EXIT_CONFIG, ConfigError, print_unexpected
from sslcli.report.terminal import guard_terminal, log_and_print
from sslcli.runs.identity import run_dir_of
from sslcli.system import child_processes
from sslcli.system.launch_variables import AGENT, launched, local_world_size


def launch(job: dict[str, Any]) -> int:
    """Run ssl-train and return the exit code. `job` is the validated configuration as plain values."""
    config = run_config(job)
    kind = config.launcher.kind if launched() is None else "local"
    if kind != config.launcher.kind and AGENT not in os.environ:
        check_other_launcher(config.launcher)
    if kind == "slurm" and config.find_batch_size:
        raise ConfigError(
            "find_batch_size is true, but with launcher=slurm dry_run=true only prints the batch script: run the "
            "command on a node with the GPUs of the run, with launcher=local, or launcher=multi for several GPUs"
        )
    if kind == "slurm":
        from sslcli.runs import slurm_job

        return slurm_job.launch(config)
    if (
        isinstance(config.launcher, MultiSettings)
        and kind == "multi"
        and (config.find_batch_size or not config.dry_run)
    ):
        if config.find_batch_size:  # every process would print an error
            check_device_of_search(config)
        on_message = partial(log_and_print, config.directory)
        return run_on_this_node("sslcli.runs.launch", config.plain(), config.launcher, on_message=on_message)
    gc.disable()  # hardly any object that is created before the first step can be freed
    try:
        from sslcli.runs.worker import run

        return run(config)
    finally:
        gc.enable()


def run_config(job: dict[str, Any]) -> RunConfig:
    """Return the configuration of a run with its directory. `job` is the validated configuration as plain values."""
    config = RunConfig.from_plain(job)
    return with_old_settings(config.changed(run_dir=run_dir_of(config)))


def check_device_of_search(config: RunConfig) -> None:
    """Raise ConfigError unless this machine has GPUs, on which a batch size can be searched."""
    from sslcli.distributed.devices import pick_device
    from sslcli.runs.batch_size_search import configured

    configured(config, pick_device(config.device))


def run_on_this_node(
    module: str, job: dict[str, Any], launcher: MultiSettings, *, on_message: Callable[[str], None], **options: Any
) -> int:
    """Run `python -m MODULE CONFIG.json` in several processes of this node, and return one exit code for all.

    `job` is the content of CONFIG.json. `on_message` and `options` are arguments of `run_processes`.
    """
    from sslcli.distributed.elastic import run_processes

    with tempfile.TemporaryDirectory(prefix="sslcli-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        return run_processes(
            [*child_processes.arguments(module), str(path)],
            processes=launcher.processes,
            max_restarts=launcher.max_restarts,
            on_message=on_message,
            **options,
        )


def with_old_settings(config: RunConfig) -> RunConfig:
    """Return the configuration with which a run starts or resumes.

    If an older version of sslcli started the run, its stored configuration lacks the settings that were added later.
    Each of these settings gets the value that reproduces the behavior of the older version, unless the command line
    sets it.
    """
    if not (config.directory / "config.yaml").is_file():
        return config
    from sslcli.runs.directory import read_config

    set_keys = keys_of(config.overrides)
    stored = read_config(config.directory)
    dataset = resumed_dataset(config.dataset, stored.get("dataset"), set_keys)
    found = resumed_config(config.values, stored, set_keys) | {"dataset": dataset}
    changed = {name: value for name, value in found.items() if value != config.values[name]}
    return config.changed(**changed) if changed else config


def check_other_launcher(settings: LauncherSettings) -> None:
    """Raise ConfigError if the settings conflict with the launcher, such as torchrun, that started this process."""
    wanted, here = f"launcher is {settings.kind!r}", local_world_size()
    if isinstance(settings, MultiSettings):
        if settings.processes in (None, here):
            return
        wanted = f"launcher.processes is {settings.processes}"
    raise ConfigError(
        f"{wanted}, but the environment variable RANK is {os.environ['RANK']!r}, so another launcher started this "
        f"process, as one of {here} on this node: use launcher=local to join its processes, or unset RANK and "
        "WORLD_SIZE to start without that launcher"
    )


def main() -> None:
    """Run one of several training processes: `python -m sslcli.runs.launch CONFIG.json`.

    After an unexpected error, the exit code requests a restart only if a checkpoint was saved since this process
    started.
    """
    # Before the run installs its signal handlers, there is nothing to save, so Ctrl-C ends the run without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sslcli.distributed.processes import EXIT_LOST, die_with_parent, end_process
    from sslcli.runs.slurm_job import stored_config

    guard_terminal()
    try:
        module = "sslcli.runs.launch"
        (path,) = child_processes.given_arguments(module, "CONFIG.json", launcher="multi", variables=[AGENT])
        die_with_parent()
        config = stored_config(Path(path)).plain()
    except ConfigError as error:
        sys.exit(end_process("train", error, EXIT_CONFIG, wait=0))
    child_processes.find_trusted(config["trust"])
    before = checkpoints(config)
    try:
        sys.exit(launch(config))
    except ConfigError as error:
        sys.exit(end_process("train", error, EXIT_CONFIG, wait=0))
    except Exception as error:
        code = print_unexpected("train", error)
        sys.exit(code if code == EXIT_CONFIG or checkpoints(config) == before else EXIT_LOST)


def checkpoints(config: dict[str, Any]) -> set[str]:
    """Return the names of the checkpoints of a run."""
    return {path.name for path in checkpoint_names.all_of(Path(config["run_dir"]))}


if __name__ == "__main__":
    main()
