"""`sslcli.train` and `sslcli.evaluate`: the commands ssl-train and ssl-eval as Python functions."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

from sslcli.cli.command import ANSWERED_BY_HYDRA, read_arguments
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import EvalConfig
from sslcli.errors import ConfigError
from sslcli.runs.launch import run_config
from sslcli.runs.network_choice import check_changes, check_network, with_run_of_weights
from sslcli.system.child_processes import find_trusted
from sslcli.system.launch_variables import launched
from sslcli.system.memory import release_freed_memory

REFUSED_FLAGS = (*ANSWERED_BY_HYDRA, "cfg", "help", "multirun")


@dataclass(frozen=True)
class TrainingResult:
    """Result of a finished training run.

    Attributes:
        run_dir: the run directory.
        step: number of steps of the run.
        checkpoint: the checkpoint of the last step.
        metrics: the last value of each scalar in metrics.jsonl, such as "train/loss" and "monitor/knn_top1".
    """

    run_dir: Path
    step: int
    checkpoint: Path
    metrics: dict[str, float]


@dataclass(frozen=True)
class EvaluationResult:
    """Result of an evaluation.

    Attributes:
        protocol: name of the protocol, such as "knn".
        split: the split on which accuracies are reported: "val" or "test".
        top1: fraction of correct predictions; None if the protocol measures something else.
        interval: 95 % confidence interval of `top1`; None if there is none.
        baselines: top1 of the baselines, such as "pixels" and "random".
        results_dir: folder of the result file.
        content: the whole content of the result file.
    """

    protocol: str
    split: str | None
    top1: float | None
    interval: tuple[float, float] | None
    baselines: dict[str, float]
    results_dir: Path
    content: dict[str, Any]


def train(overrides: Sequence[str]) -> TrainingResult:
    """Train in this process, with the same result as `ssl-train OVERRIDES`. Print what the command prints.

    A run that was interrupted is resumed, and a finished run is not trained again. Global settings of Python, torch and
    Hydra are restored. The function must be called in the main thread.

    Args:
        overrides: overrides such as "method=byol" and "train.epochs=5", one per string, and the flag `--config-dir`.

    Raises ConfigError for invalid settings and data, TrainingFailed if training cannot continue, and Stopped after an
    interrupt or the time limit; in the last case, the same call resumes the run.
    """
    job = composed("train", overrides)
    for key in ("dry_run", "find_batch_size"):
        if job[key]:
            raise ConfigError(f"{key} is true, but sslcli.train trains: use the command ssl-train, or remove {key}")
    config = run_config(job)
    with restored_process(config.device, config.trust):
        from sslcli.engine import checkpoint
        from sslcli.report.metrics import read
        from sslcli.runs.worker import execute

        execute(config)
        paths = checkpoint.all_of(config.directory)
    if not paths:
        raise ConfigError(
            f"the run {config.directory} is finished, but its checkpoints were deleted: set run_dir to another "
            "directory, or train it again with resume=never"
        )
    last = paths[-1]
    metrics = {name: value for line in read(config.directory / "metrics.jsonl") for name, value in line.items()}
    known = {name: float(value) for name, value in metrics.items() if value is not None and "/" in name}
    return TrainingResult(config.directory, checkpoint.step_of(last), last, known)


def evaluate(overrides: Sequence[str]) -> EvaluationResult:
    """Evaluate one run or weight file in this process, with the same result file as `ssl-eval OVERRIDES`.

    See `train` for the arguments, the errors, and the restored settings.
    """
    job = with_run_of_weights(composed("eval", overrides))
    check_network(job, "give run=DIR, or weights=FILE with backbone=... and dataset=..., and not both")
    if job["run"] is not None and not (Path(job["run"]) / "config.yaml").exists():
        raise ConfigError(f"run is {job['run']!r}, but it has no config.yaml: sslcli.evaluate evaluates one run")
    check_changes(job)
    with restored_process(job["device"], job["trust"]):
        from sslcli.runs.evaluate import evaluated

        found = evaluated(EvalConfig.from_plain(job))
    return EvaluationResult(
        protocol=found["protocol"],
        split=found.get("split"),
        top1=found.get("top1"),
        interval=None if found.get("interval") is None else tuple(found["interval"]),
        baselines={name: each["top1"] for name, each in found.get("baselines", {}).items() if "top1" in each},
        results_dir=Path(found["results_dir"]),
        content={key: value for key, value in found.items() if key != "results_dir"},
    )


def composed(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the validated configuration of overrides. `name` is train or eval. Hydra's global state is restored."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides is {overrides!r}, but it must be a list of strings, one per override")
    hydra, path = GlobalHydra.instance().hydra, list(sys.path)
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        arguments = read_arguments(name, list(overrides))
        for flag in REFUSED_FLAGS:
            if getattr(arguments, flag):
                raise ConfigError(
                    f"the flag --{flag.replace('_', '-')} works only with the command ssl-{name}: remove it"
                )
        (job,) = checked_jobs(name, arguments)
    finally:
        Singleton.set_state(state)
        GlobalHydra.instance().hydra = hydra
        sys.path[:] = path
    if job["launcher"]["kind"] != "local" or launched() is not None:
        raise ConfigError(
            f"the Python function runs in this process alone: to start several processes, use the command ssl-{name} "
            "with the launcher"
        )
    return job


@contextmanager
def restored_process(device: str, trust: Sequence[str]) -> Iterator[None]:
    """Restore the global settings that a command changes after the `with` block.

    `device` is the setting `device`, and `trust` lists the packages that may be imported from the current directory.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("sslcli.train and sslcli.evaluate handle signals, so they must be called in the main thread")
    path, environment, collects = list(sys.path), dict(os.environ), gc.isenabled()
    find_trusted(trust)
    from sslcli.data import worker_server
    from sslcli.distributed import devices  # torch may set environment variables when it is imported

    try:
        chosen = devices.pick_device(device)
        worker_server.start(chosen)  # reading the random state of a GPU initializes CUDA
        with devices.unchanged_settings(), devices.unchanged_random_state(chosen):
            yield
    finally:
        sys.path[:] = path
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if not collects:
            gc.disable()
        release_freed_memory()
