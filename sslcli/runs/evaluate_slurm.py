"""launcher=slurm of ssl-eval: submission from a login node, and execution on each node of the job."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from sslcli.config.own_dataset import Change
from sslcli.config.paths import results_dir_of
from sslcli.config.run_config import EvalConfig
from sslcli.config.slurm import SlurmSettings
from sslcli.engine import checkpoint_names
from sslcli.errors import EXIT_STOPPED, ConfigError, print_error
from sslcli.report.terminal import print_text
from sslcli.runs.slurm import job
from sslcli.runs.slurm.script import Command, render
from sslcli.system import atomic, child_processes
from sslcli.system.locks import locked
from sslcli.system.stored import DamagedFile, read_json

MODULE = "sslcli.runs.evaluate_slurm"
NEUTRAL = ("launcher", "workers")  # settings that may differ between two commands of the same evaluation
REMEDY = "run the same ssl-eval command again"


def launch(values: dict[str, Any]) -> int:
    """Submit an evaluation unless its job is already queued or running, and return the exit code.

    `values` is the validated configuration as plain values. If launcher.wait is true, this function prints the log of
    the job, which contains the tables, until the job ends. The result is then the exit code of the job. Raises
    ConfigError if there is nothing to evaluate, if the folder of the job cannot be written, or if Slurm rejects the
    job.
    """
    config = EvalConfig.from_plain(values)
    assert isinstance(config.launcher, SlurmSettings)
    folder, evaluated = folder_of(values), Path(values["run"] or values["weights"])
    if values["run"] is not None and not any(map(checkpoint_names.all_of, (evaluated, *evaluated.glob("*/")))):
        raise ConfigError(f"{evaluated} is neither a run directory nor a directory of runs with checkpoints")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the files of the job go to {folder}, which cannot be written ({error.strerror}): change its permissions, "
            "or copy the run to a directory that you can write to"
        ) from error
    with locked(folder / "submit.lock"):
        active = job.active_job(folder)
        if active is None:
            job_id = job.submit(folder, script_of(config.launcher, folder, values), values)
        else:
            job_id = active[0]
            print_text(f"job {job_id} is {active[1]} for this evaluation already")
    job.print_job(job_id, folder, of=evaluated)
    return job.wait(job_id, folder, command="ssl-eval") if config.launcher.wait else 0


def results_of(values: dict[str, Any]) -> Path:
    """Return the absolute folder with the results of a run, of a folder of runs or of weights."""
    return Path(values["run"]) / "eval" if values["run"] is not None else results_dir_of(values["weights"]).absolute()


def folder_of(values: dict[str, Any]) -> Path:
    """Return the absolute folder for the files of the job. Every evaluation, with its own settings, has one."""
    settings = {key: value for key, value in values.items() if key not in NEUTRAL and not key.startswith("_")}
    settings["changes"] = values["_dataset_changes_"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    name = values["protocol"]["_target_"].rpartition(".")[2].lower()
    return results_of(values) / "slurm" / f"{name}_{digest}"


def script_of(settings: SlurmSettings, folder: Path, values: dict[str, Any]) -> str:
    """Return the batch script of an evaluation. `values` is its configuration as plain values."""
    among = values["run"] or results_of(values)  # a folder of runs contains the results of each run
    command = Command(
        name="ssl-eval",
        module=MODULE,
        job_name=f"ssl-eval-{Path(values['run'] or values['weights']).name}",
        saved=f"find {shlex.quote(str(among))} -path '*/features/*.pt' 2>/dev/null | sort",
        progress="features",
        restarts_from="the cached features",
    )
    return render(settings, command, folder=folder, config=folder / job.CONFIG, cwd=Path.cwd(), python=sys.executable)


class StoredEvalConfig(TypedDict):
    """Required keys of config.json, the configuration of ssl-eval as plain values."""

    run: str | None
    weights: str | None
    device: str
    launcher: dict[str, Any]
    protocol: dict[str, Any]
    trust: list[str]
    _dataset_changes_: list[Any]
    _lines_: list[str]


def stored_values(path: Path) -> dict[str, Any]:
    """Return the configuration that `launch` wrote. Raises ConfigError if the file is missing or damaged."""
    try:
        values: dict[str, Any] = dict(read_json(path, StoredEvalConfig, remedy=REMEDY))
        values["_dataset_changes_"] = [Change(*change) for change in values["_dataset_changes_"]]
        EvalConfig.from_plain(values)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {path}: {REMEDY}") from error
    except (KeyError, TypeError) as error:
        raise DamagedFile(path, f"its settings are not those of ssl-eval: {error}", REMEDY) from error
    return values


def run_node(path: Path, endpoint: str) -> int:
    """Start the processes of this node of the job, and return their exit code.

    `path` is the configuration of the job, and `endpoint` is HOST:PORT of the rendezvous of all nodes. Raises
    ConfigError if this node has fewer GPUs than launcher.gpus_per_node.

    If a signal stopped the processes, the batch script is asked to requeue the job.
    """
    config = EvalConfig.from_plain(stored_values(path))
    settings = config.launcher
    assert isinstance(settings, SlurmSettings)
    job.check_gpus(settings, config.device, action="evaluate")
    if settings.nodes * settings.processes == 1:
        child_processes.find_trusted(config.trust)
        from sslcli.runs.evaluate import run

        code = run(config)
    else:
        module, on_message = "sslcli.runs.evaluate_launch", partial(print_error, "eval")
        code = job.run_processes_of_node(module, path, settings, endpoint, on_message=on_message)
    if code == EXIT_STOPPED:
        atomic.replace(path.parent / "want_requeue", b"stopped by a signal")
    return code


if __name__ == "__main__":
    job.main(MODULE, "eval", run_node)
