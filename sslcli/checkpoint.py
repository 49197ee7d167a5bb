"""Checkpoints: the only code that writes or reads them.

    <run_dir>/checkpoints/
        step-00001234.pt       tensors and plain values, readable with torch.load(weights_only=True)
        step-00001234.sha256   its checksum, in the format of sha256sum
        last                   link to the newest .pt

A file appears under its name only when it is complete and on disk: it is written under another name, synchronised
and renamed, checksum first. So a process killed at any moment leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sslcli.atomic import replace, synchronise
from sslcli.errors import ConfigError, TrainingFailed
from sslcli.migrations import SCHEMA, upgrade


class NewerCheckpoint(ConfigError):
    """A checkpoint of a newer version of sslcli: not broken, so nothing may take its place."""


def folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def path_of(run_dir: Path, step: int) -> Path:
    """The file of the checkpoint after `step` optimizer steps."""
    return folder(run_dir) / f"step-{step:08d}.pt"


def all_of(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(folder(run_dir).glob("step-*.pt"))


def save(run_dir: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state`, which holds "step", make it the last one, and delete all but the newest `keep` up to it.

    Raises TrainingFailed when the disk refuses; earlier checkpoints are untouched then.
    """
    path = path_of(run_dir, state["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob("*.tmp"):
        os.unlink(leftover)
    temporary = path.with_suffix(".pt.tmp")
    try:
        torch.save({"schema": SCHEMA, **state}, temporary)
        digest = sha256(temporary)
        replace(path.with_suffix(".sha256"), f"{digest}  {path.name}\n".encode())
        synchronise(temporary)
        os.replace(temporary, path)
        link = path.parent / "last.tmp"
        os.symlink(path.name, link)
        os.replace(link, path.parent / "last")
        synchronise(path.parent)
    except (OSError, RuntimeError) as error:
        for leftover in path.parent.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        if "DataLoader worker" in str(error):  # the signal of a dying worker finds us wherever we are
            raise
        kept = all_of(run_dir)
        raise TrainingFailed(
            f"the checkpoint {path} could not be written ({str(error).splitlines()[0]}). "
            + (f"{kept[-1].name} is intact" if kept else "There is no earlier one")
            + ": make room or mend the disk, then start the same command again to go on"
        ) from error
    prune(path, keep=keep)
    return path


def prune(newest: Path, *, keep: int) -> None:
    """Delete all checkpoints but the `keep` up to `newest`, and checksums without a checkpoint.

    Later ones are there only when they could not be read and the run went on from an earlier one; they would count
    as newest for ever.
    """
    paths = all_of(newest.parent.parent)
    end = paths.index(newest) + 1
    with suppress(OSError):  # what cannot be deleted must not end a run
        for old in paths[: max(0, end - keep)] + paths[end:]:
            os.unlink(old)
        for recorded in newest.parent.glob("step-*.sha256"):
            if not recorded.with_suffix(".pt").exists():
                os.unlink(recorded)


def load_newest(run_dir: Path, *, device: torch.device, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None where there is none.

    One that is truncated, altered or unreadable is passed over with a warning. Raises ConfigError when there are
    checkpoints and none can be read, or one is of a newer version.
    """
    paths = all_of(run_dir)
    for path in reversed(paths):
        try:
            return load(path, device=device)
        except NewerCheckpoint:
            raise
        except ConfigError as error:
            warn(f"{error}. Falling back to the one before")
    if paths:
        raise ConfigError(
            f"none of the {len(paths)} checkpoints in {folder(run_dir)} can be read: "
            "delete the folder to start afresh, or restore a copy"
        )
    return None


def load(path: Path, *, device: torch.device) -> dict[str, Any]:
    """Read one checkpoint without running any code it may hold. Raises ConfigError saying what is wrong with it."""
    recorded = path.with_suffix(".sha256")
    if not path.exists():
        raise ConfigError(f"there is no checkpoint {path}")
    try:
        intact = not recorded.exists() or recorded.read_bytes().split()[:1] == [sha256(path).encode()]
    except OSError as error:
        raise ConfigError(f"the checkpoint {path} cannot be read ({error.strerror})") from error
    if not intact:
        raise ConfigError(f"the checkpoint {path} does not match its checksum: it was cut short or altered")
    state = load_weights(path, device=device)
    if state.get("schema", 0) > SCHEMA:
        raise NewerCheckpoint(
            f"the checkpoint {path} is of a newer version of sslcli (schema {state['schema']} > {SCHEMA}): update "
            "sslcli to go on"
        )
    if not isinstance(state.get("step"), int):
        raise ConfigError(f"{path} is not a checkpoint of sslcli: it tells no step")
    return upgrade(state)


def load_weights(path: Path, *, device: torch.device) -> dict[str, Any]:
    """A dictionary saved by torch, without running any code it may hold. Raises ConfigError where it is none."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path} was refused: it is damaged, or holds more than tensors and plain values") from error
    except Exception as error:  # on damaged bytes torch raises nearly any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path} cannot be read ({reason})") from error
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds a {type(state).__name__}, but a dictionary of tensors is needed")
    return state


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators in this process."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Continue torch's generators where they were."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
