"""Reading and writing of checkpoints. The module `sharded_checkpoint` does the same for sharded parameters.

    <run_dir>/checkpoints/
        step-00001234.pt       tensors and plain values, readable with torch.load(weights_only=True)
        step-00001234.sha256   checksum of the file step-00001234.pt, in the format of sha256sum
        step-00001234/         written instead of both files if parameters are sharded, see sharded_checkpoint.py
        last                   link to the newest checkpoint

A checkpoint is written under a temporary name, synchronized to disk (fsync), and then renamed. The checksum file is
renamed before the checkpoint. The final name of a checkpoint therefore exists only if the checkpoint is complete. If
the process is killed at any moment, earlier checkpoints remain intact.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sslcli.engine.checkpoint_names import all_of as all_of
from sslcli.engine.checkpoint_names import folder as folder
from sslcli.engine.checkpoint_names import path_of as path_of
from sslcli.engine.checkpoint_names import step_of as step_of
from sslcli.engine.migrations import SCHEMA, upgrade
from sslcli.errors import ConfigError, TrainingFailed
from sslcli.system.atomic import beside, digest_of, discard, replace, synchronize
from sslcli.system.atomic import sha256 as sha256
from sslcli.system.regular_files import open_regular
from sslcli.weights.files import read_weights

if TYPE_CHECKING:  # the import takes seconds and is only needed for sharded runs
    from sslcli.engine.sharded_checkpoint import Placement


class RefusedCheckpoint(ConfigError):
    """Raised for an undamaged checkpoint that the run must not load.

    A newer version of sslcli, or a run with another configuration, wrote the checkpoint. No older checkpoint is loaded
    in its place.
    """


def save(run_dir: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint of step `state["step"]`. Then delete all checkpoints except the newest `keep`.

    Returns the path of the checkpoint. Raises TrainingFailed on a disk error. Earlier checkpoints then remain
    untouched.
    """
    path = path_of(run_dir, state["step"])
    make_room(path.parent)
    try:
        with beside(path) as temporary:
            torch.save({"schema": SCHEMA, **state}, temporary)
            replace(path.with_suffix(".sha256"), f"{sha256(temporary)}  {path.name}\n".encode())
            synchronize(temporary)
            publish(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            make_room(path.parent)
        if "DataLoader worker" in str(error):  # a dying data worker can raise at any point
            raise
        raise write_failure(path, error) from error
    prune(path, keep=keep)
    return path


def make_room(parent: Path) -> None:
    """Create the checkpoint folder `parent`, and delete temporary files that killed runs left in it."""
    parent.mkdir(exist_ok=True)
    for leftover in parent.glob("*.tmp"):
        discard(leftover)


def publish(temporary: Path, path: Path) -> None:
    """Rename the complete checkpoint `temporary` to its final name `path`, and update the link `last`."""
    if path.is_dir():  # it could not be read, so the run resumed from an earlier checkpoint and reached this step again
        discard(path)
    os.replace(temporary, path)
    with beside(path.parent / "last") as link:
        os.symlink(path.name, link)
        os.replace(link, path.parent / "last")
    synchronize(path.parent)


def deleted(run_dir: Path) -> TrainingFailed:
    """Return the error for a run directory that was deleted, renamed or replaced during the run."""
    return TrainingFailed(
        f"the run directory {run_dir} was deleted, renamed or replaced during the run, so nothing more can be saved: "
        "restore it to resume, or run the same command again to start from the beginning"
    )


def write_failure(path: Path, error: Exception) -> TrainingFailed:
    """Return the error for a checkpoint that could not be written."""
    if not path.parent.parent.exists():
        return deleted(path.parent.parent)
    kept = [each for each in all_of(path.parent.parent) if step_of(each) < step_of(path)]
    return TrainingFailed(
        f"the checkpoint {path} could not be written ({str(error).splitlines()[0]}). "
        + (f"{kept[-1].name} is intact" if kept else "There is no earlier one")
        + ": free space or repair the disk, then run the same command again to resume"
    )


def prune(newest: Path, *, keep: int) -> None:
    """Delete all checkpoints except `newest` and the `keep` - 1 checkpoints before it.

    Also delete checksum files whose checkpoint does not exist.

    `newest` is the checkpoint that the run has just written. Checkpoints with a larger step exist only if they could
    not be read and the run resumed from an earlier checkpoint. They are deleted, because they would otherwise count as
    the newest checkpoints.
    """
    paths = all_of(newest.parent.parent)
    before = [path for path in paths if step_of(path) < step_of(newest)]
    kept = {newest, *before[len(before) - min(len(before), keep - 1) :]}
    with suppress(OSError):  # a failed deletion must not end the run
        for old in paths:
            if old not in kept:
                discard(old)
        for recorded in newest.parent.glob("step-*.sha256"):
            if not recorded.with_suffix(".pt").exists():
                os.unlink(recorded)


def load_newest(
    run_dir: Path,
    *,
    device: torch.device,
    warn: Callable[[str], None],
    like: Placement | None = None,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Load the newest usable checkpoint. Return None if there are no checkpoints.

    Damaged checkpoints are skipped with a warning.

    Args:
        run_dir: the run directory.
        device: device of the loaded tensors.
        warn: function that prints a warning.
        like: function that selects the tensors to shard, see `sharded_checkpoint.Placement`.
        check: function of the path and the content of a checkpoint. It raises RefusedCheckpoint if the run must not
            load the checkpoint, and another ConfigError if the checkpoint is damaged.

    Raises:
        RefusedCheckpoint: a newer version of sslcli wrote the newest undamaged checkpoint, or `check` refuses it.
        ConfigError: there are checkpoints, but all of them are damaged.
    """
    paths = all_of(run_dir)
    for path in reversed(paths):
        try:
            state = load(path, device=device, like=like)
            if check is not None:
                check(path, state)
            return state
        except RefusedCheckpoint:
            raise
        except ConfigError as error:
            warn(f"{error}. Falling back to the previous one")
    if paths:
        raise ConfigError(
            f"none of the {len(paths)} checkpoints in {folder(run_dir)} can be used: "
            "delete the folder to start from the beginning, or restore a copy"
        )
    return None


def load(path: Path, *, device: torch.device, like: Placement | None = None, weights: bool = False) -> dict[str, Any]:
    """Load one checkpoint without executing code from the file.

    Raises ConfigError if the checkpoint is missing or damaged, or if a newer version of sslcli wrote it.

    path: a file, or the folder of a sharded checkpoint.
    device: device of tensors that are not sharded.
    like: function that selects the tensors to shard, see `sharded_checkpoint.Placement`; None = no tensor is sharded.
    weights: if True, the tensors of the optimizer are not loaded from a sharded checkpoint.
    """
    if not path.exists():
        raise ConfigError(f"there is no checkpoint {path}")
    if path.suffix == ".pt":
        state, _ = load_file(path, device=device)
    else:
        from sslcli.engine import sharded_checkpoint

        parts = ("method",) if weights else sharded_checkpoint.PARTS
        state = sharded_checkpoint.read(path, device=device, like=like, only=parts)
    state = current_state(path, state)
    if like is not None and path.suffix == ".pt":
        from sslcli.engine import sharded_checkpoint

        state = sharded_checkpoint.spread(state, like)
    return state


def current_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Convert `state`, the content of the checkpoint `path`, to the current schema, and return it.

    Raises RefusedCheckpoint if a newer version of sslcli wrote the checkpoint. Raises ConfigError if a field that the
    conversion needs is missing.
    """
    schema = state.get("schema", 0)
    if not isinstance(schema, int):
        raise ConfigError(f"{path} is not a checkpoint of sslcli: its schema is {schema!r}")
    if schema > SCHEMA:
        raise RefusedCheckpoint(
            f"the checkpoint {path} is of a newer version of sslcli (schema {schema} > {SCHEMA}): update "
            "sslcli to resume"
        )
    if not isinstance(state.get("step"), int):
        raise ConfigError(f"{path} is not a checkpoint of sslcli: it has no step")
    try:
        return upgrade(state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged: its fields are not those of schema {schema} ({type(error).__name__}: {error})"
        ) from error


@dataclass(frozen=True)
class Loaded:
    """The weights of a checkpoint in memory. They stay valid if the file is deleted."""

    path: Path
    digest: str  # SHA-256 hex digest of the file; for a folder, of its file SHA256SUMS
    weights: dict[str, Any]  # state of the method
    config: Any  # stored configuration; None if an old version saved the checkpoint

    @property
    def step(self) -> int:
        return step_of(self.path)


def load_weights_of(path: Path) -> Loaded:
    """Load the weights of one checkpoint to the CPU. Raises ConfigError if the checkpoint is missing or invalid."""
    device = torch.device("cpu")
    try:
        if path.is_dir():
            digest = sha256(path / "SHA256SUMS")
            state = load(path, device=device, weights=True)
        else:
            state, digest = load_file(path, device=device)
            state = current_state(path, state)
    except OSError as error:
        raise ConfigError(f"the checkpoint {path} cannot be read ({error.strerror})") from error
    weights = state.get("method")
    if not isinstance(weights, dict):
        raise ConfigError(f"the checkpoint {path} is damaged (it has no weights): choose another checkpoint")
    return Loaded(path, digest, weights, state.get("config"))


def load_file(path: Path, *, device: torch.device) -> tuple[dict[str, Any], str]:
    """Load an unsharded checkpoint. Return its content and the digest of the file.

    The digest is compared with the checksum file if there is one. The file is opened once, so it may be deleted while
    it is read. Raises ConfigError if the file is invalid.
    """
    try:
        with open_regular(path) as file:
            digest = digest_of(file)
            with suppress(FileNotFoundError):
                if path.with_suffix(".sha256").read_bytes().split()[:1] != [digest.encode()]:
                    raise ConfigError(f"the checkpoint {path} does not match its checksum: it was truncated or altered")
            file.seek(0)
            return read_weights(file, path, device=device), digest
    except OSError as error:
        raise ConfigError(f"the checkpoint {path} cannot be read ({error.strerror})") from error


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's random number generators in this process: of the CPU and, for GPUs, of `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states of torch's random number generators from the result of `rng_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())
