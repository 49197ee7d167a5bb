"""Compare the length that a command sets for a run with the length in its run directory, and plan an extension.

An extension adds a phase to a run. A phase is a part of a run during which the length that the command sets did not
change. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from sslcli.engine import checkpoint_names
from sslcli.engine.phases import Phase, phases_from, plan
from sslcli.errors import ConfigError

PHASES = "phases"  # key in the section `effective` of config.yaml; only runs that were extended have it


def stored_phases(config: Mapping[str, Any]) -> tuple[Phase, ...]:
    """Return the phases of a run from `config`, the content of its `config.yaml`.

    A run has one phase, and each extension of the run adds a phase. If the content has no number of steps, the result
    is (). Raises ValueError if the phases are invalid.
    """
    effective = config.get("effective") or {}
    rows = effective.get(PHASES)
    if rows is None:
        return (Phase(0, effective["steps"], "rescale"),) if _is_count(effective.get("steps")) else ()
    try:
        return phases_from(rows)
    except ValueError as error:
        raise ValueError(f"effective.{PHASES} is invalid: {error}") from error


def requested_steps(config: Mapping[str, Any], values: Mapping[str, Any]) -> int | None:
    """Return the number of steps of a run that continues with the settings `values`, or None if it is unknown.

    `config` is the content of the run's `config.yaml`. It contains the number of steps per epoch, which is needed if
    `values` contains a number of epochs.
    """
    train, effective = values["train"], config.get("effective") or {}
    if train.get("max_steps"):
        return int(train["max_steps"])
    per_epoch = effective.get("steps per epoch", effective.get("steps an epoch"))  # version 0.1 wrote the latter
    return train["epochs"] * per_epoch if _is_count(per_epoch) else None


def newest_step(run_dir: Path) -> int:
    """Return the step in the file name of the newest checkpoint of a run, or 0 if there is no checkpoint."""
    saved = checkpoint_names.all_of(run_dir)
    return checkpoint_names.step_of(saved[-1]) if saved else 0


def has_same_length(config: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Return True if a command sets the length that a run already has.

    `config` is the content of the run's `config.yaml`, and `values` is the configuration of the command. Two lengths
    are equal if they have the same number of steps.
    """
    stored = stored_phases(config)
    one, other = config.get("train") or {}, values["train"]
    if all(one.get(key) == other.get(key) for key in ("epochs", "max_steps")):
        return True
    return bool(stored) and stored[-1].total == requested_steps(config, values)


def is_earlier_length(run_dir: Path, config: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Return True if `values` set a length that the run has reached, and the run was then extended beyond it.

    `config` is the content of the run's `config.yaml`, and `values` are the settings of the current command.
    """
    phases, total = stored_phases(config), requested_steps(config, values)
    if total is None or newest_step(run_dir) < total:
        return False
    return any(phase.total == total <= later.start for phase, later in pairwise(phases))


def check_length(run_dir: Path, config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a run may resume with the length set in `values`.

    The length may be unchanged. It may also be greater if the run has a checkpoint from which it can continue.
    """
    if is_earlier_length(run_dir, config, values):
        return
    phases = planned_phases(run_dir, config, values)
    is_finished = (run_dir / "done").exists()
    if is_finished and not checkpoint_names.all_of(run_dir) and not has_same_length(config, values):
        raise ConfigError(
            f"the finished run in {run_dir} cannot be extended to {phases[-1].total} steps, because its checkpoints "
            "were deleted: restore them, or choose another run_dir to start a new run"
        )


def planned_phases(run_dir: Path, config: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Phase, ...]:
    """Return the phases of a run that continues with the settings `values`.

    A run has one phase, and each extension of the run adds a phase. `config` is the content of the run's `config.yaml`.
    If `config` does not contain the numbers from which the length of the run in steps is computed, the result is ().
    All processes get the same result, even if one of them has already stored the phases.

    Raises ConfigError if the run would become shorter, or if the run was already extended to the same length with
    another value of `train.extend`.
    """
    total = requested_steps(config, values)
    stored = stored_phases(config)
    if total is None or not stored:
        return ()
    extend = values["train"].get("extend", "rescale")
    return plan(stored, step=newest_step(run_dir), total=total, extend=extend)


def phase_rows(phases: tuple[Phase, ...]) -> dict[str, Any]:
    """Return the entry of the section `effective` of config.yaml with the phases of an extended run.

    If the run was never extended, return {}.
    """
    return {PHASES: [asdict(phase) for phase in phases]} if len(phases) > 1 else {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
