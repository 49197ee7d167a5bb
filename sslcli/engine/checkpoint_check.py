"""Checks of the content of a checkpoint before it is used: fields and types, finite weights, and the configuration."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from sslcli.config.comparison import changed_settings, relative_path_keys
from sslcli.config.moved import current_config
from sslcli.distributed import collectives
from sslcli.engine import fsdp
from sslcli.engine.checkpoint import RefusedCheckpoint
from sslcli.engine.phases import phases_from
from sslcli.engine.run import Run
from sslcli.system.stored import DamagedFile, checked

REMEDY = "restore a copy"
NOT_OF_THE_NETWORK = ("train", "monitor", "dataset")  # sections that do not change the network of a checkpoint


class Generators(TypedDict):
    """States of torch's random number generators."""

    cpu: Tensor


class Means(TypedDict):
    """State of `sslcli.engine.metric_means.MetricMeans` in a checkpoint."""

    sums: dict[str, Tensor]
    count: int


class ProcessState(TypedDict):
    """State of one process in a checkpoint."""

    rng: Generators
    metric_means: Means


class AddedDetectorState(TypedDict, total=False):
    """Entries of `DetectorState` that checkpoints of version 0.2 lack."""

    uninformed: float
    information: float


class DetectorState(AddedDetectorState):
    """State of `sslcli.engine.collapse.CollapseDetector` in a checkpoint."""

    seen: float
    alarms: float
    stuck: float
    std: float
    spread: float
    rankme: float


class MonitorOptions(TypedDict, total=False):
    """Optional fields of the state of a monitor: only runs with initial weights have them."""

    start_knn: float


class MonitorState(MonitorOptions):
    """State of `sslcli.engine.monitor.Monitor` in a checkpoint."""

    detector: DetectorState
    wall: float


class OptimizerState(TypedDict):
    """State of an optimizer in a checkpoint."""

    state: dict[Any, Any]
    param_groups: list[Any]


class TrainingOptions(TypedDict, total=False):
    """Optional fields of a checkpoint. Some checkpoints lack them."""

    config: dict[str, Any] | None
    phases: list[dict[str, Any]]


class TrainingState(TrainingOptions):
    """Fields of a checkpoint that a run needs to resume."""

    step: int
    method: dict[str, Any]
    optimizer: OptimizerState
    scaler: dict[str, Any]
    processes: list[ProcessState]
    monitor: MonitorState
    environment: dict[str, Any]


def check_state(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Check the content `state` of the checkpoint `path` before `run` resumes from it.

    With sharded parameters, this is a collective operation: all processes must call it. Raises RefusedCheckpoint if a
    run with another configuration saved the checkpoint. Raises DamagedFile if fields are missing or have wrong types,
    or if a weight is not finite.
    """
    checked(state, TrainingState, path, remedy=REMEDY)
    if not state["processes"]:
        raise DamagedFile(path, "it has the state of no process", REMEDY)
    try:
        if "phases" in state:  # only runs that were extended store phases
            phases_from(state["phases"])
    except ValueError as error:
        raise DamagedFile(path, f"its phases are invalid: {error}", REMEDY) from error
    check_configuration(path, state.get("config"), run.config, may_differ=run.may_differ)
    names = {name for name, _ in run.method.named_parameters()}
    broken = [name for name in sorted(names & state["method"].keys()) if not _is_finite(state["method"][name])]
    if fsdp.is_sharded(run.method):
        broken = [name for part in collectives.gather_objects(broken) for name in part]
    if broken:
        raise DamagedFile(path, f"its weights are not finite, {broken[0]} among them", REMEDY)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(collectives.local(value)).all())


def check_configuration(path: Path, stored: Any, now: dict[str, Any], *, may_differ: Collection[str] = ()) -> None:
    """Raise RefusedCheckpoint if the configuration in a checkpoint differs from the configuration of the run.

    Args:
        path: path of the checkpoint.
        stored: configuration in the checkpoint. Checkpoints of old versions have none, and are accepted.
        now: configuration of the run.
        may_differ: keys or sections that are not compared.
    """
    if not isinstance(stored, dict):
        return
    stored = current_config(stored)[0]
    changed = changed_settings(stored, now, may_differ=(*may_differ, *relative_path_keys(stored)))
    if changed:
        raise RefusedCheckpoint(
            f"{path} is the checkpoint of a run with another configuration; what differs: {'; '.join(changed)}. "
            "Move it to its own run, or start with the values of that run"
        )
