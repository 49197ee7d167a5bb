"""Run directory: layout checks, lock, comparison with the stored configuration, and the description of the run."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, TypedDict

from sslcli.config.added import with_added_keys
from sslcli.config.comparison import changed_settings
from sslcli.config.moved import current_config
from sslcli.engine import checkpoint_names
from sslcli.engine.phases import LENGTH_KEYS
from sslcli.errors import ConfigError, is_disk_failure
from sslcli.report.terminal import print_text
from sslcli.runs import length
from sslcli.runs.moved_images import possibly_moved
from sslcli.system.locks import NO_LOCKS
from sslcli.system.regular_files import kind_of
from sslcli.system.stored import DamagedFile, checked, read_yaml

# Files and folders that the run writes during training.
WRITTEN_DURING_RUN = (checkpoint_names.FOLDER, "tensorboard", "metrics.jsonl", "console.log")
FILES = (
    "config.yaml",
    "console.log",
    "done",
    "environment.json",
    "images.npz",
    "metrics.jsonl",
    "overrides.txt",
    ".lock",
)
REMEDY = "restore a copy, or start a new run in another run_dir"
FOLDERS = (checkpoint_names.FOLDER, "eval", "export", "pictures", "slurm", "tensorboard")


class Node(TypedDict):
    """Settings of a config group that selects a class. The value of `_target_` is the dotted name of the class."""

    _target_: str


class StoredGroups(TypedDict, total=False):
    """Optional keys of config.yaml. If a key exists, its type is checked."""

    dataset: Node
    backbone: Node
    views: dict[str, Any]
    optimizer: dict[str, Any]
    launcher: dict[str, Any]
    monitor: dict[str, Any]


class StoredConfig(StoredGroups):
    """Required keys of config.yaml.

    `effective` is the last key of the file, so it is missing if the file is truncated.
    """

    seed: int
    method: Node
    train: dict[str, Any]
    effective: dict[str, Any]


class InputSettings(TypedDict):
    """Keys of the dataset that determine the input of the network."""

    image_size: int
    mean: list[float]
    std: list[float]


Effective = TypedDict("Effective", {"training images": int, "precision": str})


class TrainedConfig(TypedDict):
    """Keys of config.yaml that ssl-eval and ssl-export read."""

    seed: int
    method: Node
    dataset: Node
    backbone: Node
    views: dict[str, Any]
    monitor: dict[str, Any]
    effective: Effective


def check_layout(run_dir: Path) -> None:
    """Raise ConfigError if a path in a run directory has the wrong type.

    - If a file is expected, the path must not be a FIFO, socket, device or folder. Only console.log may be a device,
      because sslcli never reads it. For example, console.log can be a link to /dev/null, which discards the log.
    - If a folder is expected, the path must be a folder.

    Without this check, opening a FIFO would block, and opening a folder as a file would fail with an unclear error.
    """
    for name in FILES:
        path = run_dir / name
        is_device = name == "console.log" and path.is_char_device()
        if path.exists() and not path.is_file() and not is_device:
            raise ConfigError(wrong_type_message(run_dir / name))
    for name in FOLDERS:
        if (run_dir / name).exists() and not (run_dir / name).is_dir():
            raise ConfigError(f"{run_dir / name} is {kind_of(run_dir / name)}, but it must be a folder: remove it")
        check_below(run_dir / name)


def check_below(folder: Path) -> None:
    """Raise ConfigError if a folder contains an entry, at any depth, that is neither a file nor a folder."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.exists() and not path.is_file():
                raise ConfigError(wrong_type_message(path))


def wrong_type_message(path: Path) -> str:
    """Return the error message for a path that should be a file but is not."""
    return f"{path} is {kind_of(path)}, but it must be a regular file: remove it"


def is_finished(run_dir: Path) -> bool:
    """Return True if the run in this directory has finished."""
    return (run_dir / "done").exists()


def is_complete(run_dir: Path, values: dict[str, Any], config: dict[str, Any] | None = None) -> bool:
    """Return True if the run in this directory has trained as many steps as the settings `values` request.

    If a run was extended, it had a smaller length before the extension. If `values` request such an earlier length and
    the run reached it, the result is also True.

    `config` is the content of `config.yaml`. If `config` is None, the file is read.
    """
    if config is None:
        if not (run_dir / "config.yaml").exists():
            return is_finished(run_dir)
        config = read_config(run_dir)
    if length.has_same_length(config, values):
        return is_finished(run_dir)
    return length.is_earlier_length(run_dir, config, values)


def is_locked(run_dir: Path) -> bool:
    """Return True if a process holds the lock of the run directory."""
    try:
        with (run_dir / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno not in NO_LOCKS
    return False


def has_checkpoint(run_dir: Path) -> bool:
    """Return True if the run has a checkpoint. This function does not import torch."""
    return bool(checkpoint_names.all_of(run_dir))


def check_resumable(run_dir: Path, values: dict[str, Any], *, may_differ: Collection[str] = ()) -> None:
    """Raise ConfigError unless a run with the settings `values` may start, resume or be extended in `run_dir`.

    `values` is `RunConfig.values`. The settings in `may_differ` need not equal those in the stored configuration.
    """
    started = (run_dir / "config.yaml").exists()
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir is {run_dir}, but that is a file: choose a directory")
    check_layout(run_dir)
    if values["resume"] == "never" and started:
        raise ConfigError(
            f"resume is 'never', but {run_dir} contains a run: choose another run_dir or name, or resume=auto to resume"
        )
    if values["resume"] == "must" and not has_checkpoint(run_dir):
        raise ConfigError(
            f"resume is 'must', but {run_dir} contains no checkpoint: check run_dir, or start with resume=auto"
        )
    if not started:
        return
    stored = read_config(run_dir)
    length_is_known = length.requested_steps(stored, values) is not None and length.stored_phases(stored)
    length_keys = LENGTH_KEYS if length_is_known else ("train.extend",)
    moved = possibly_moved(stored, values)  # the images are compared later
    changed = changed_settings(stored, values, may_differ=(*may_differ, *length_keys, *moved))
    if changed:
        raise ConfigError(
            f"the run in {run_dir} was started with another configuration; what differs: {'; '.join(changed)}. "
            "Use the same values to resume, or another run_dir to start a new run"
        )
    length.check_length(run_dir, stored, values)


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the stored configuration of a run. Keys of older versions are renamed to their current names.

    If an older version started the run, the file lacks the dataset settings that were added later. Each of these
    settings gets the value that reproduces the behavior of the older version.

    Raises ConfigError if the file does not exist, and DamagedFile if its content is not the configuration of a run.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{run_dir} is not a run directory: it has no config.yaml")
    check_layout(run_dir)
    config: dict[str, Any] = dict(read_yaml(path, StoredConfig, remedy=REMEDY))
    found = current_config({str(key): value for key, value in config.items()})[0]
    try:
        length.stored_phases(found)
    except ValueError as error:
        raise DamagedFile(path, str(error), REMEDY) from error
    return found | ({"dataset": with_added_keys(found["dataset"])} if "dataset" in found else {})


def read_trained_config(run_dir: Path) -> dict[str, Any]:
    """Return the stored configuration of a run, see `read_config`, for ssl-eval and ssl-export.

    Raises DamagedFile if keys of `TrainedConfig` are missing or have wrong types. Call `check_input` before the keys of
    the dataset are used.
    """
    config = read_config(run_dir)
    checked(config, TrainedConfig, run_dir / "config.yaml", remedy=REMEDY)
    return config


def check_input(run_dir: Path, config: dict[str, Any]) -> None:
    """Raise DamagedFile if a key of `InputSettings` is missing in the dataset settings `config["dataset"]` of a run.

    The keys are the image size, and the means and standard deviations for normalization.
    """
    checked(config["dataset"], InputSettings, run_dir / "config.yaml", remedy=REMEDY)


def lock(run_dir: Path, *, patience: float = 3.0) -> IO[str]:
    """Create the run directory if it does not exist, lock it, and return the open lock file.

    The lock is released when the file is closed or the process exits. Processes of a run that was just killed may still
    hold the lock, so locking is retried for `patience` seconds. ConfigError is raised if all attempts fail. If the file
    system does not support locks, a warning is printed, and the run continues without a lock. OSError is raised if the
    disk is full or broken.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        if is_disk_failure(error):
            raise
        raise ConfigError(
            f"run_dir is {run_dir}, but it cannot be written ({error.strerror}): choose another"
        ) from error
    for path in (run_dir, *(run_dir / name for name in WRITTEN_DURING_RUN)):
        if path.exists() and not os.access(path, os.W_OK, effective_ids=True):
            raise ConfigError(
                f"{path} cannot be written ({os.strerror(errno.EACCES)}), but the run writes to it: change its "
                "permissions, or copy the run to a directory that you can write to"
            )
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                print_text(
                    f"ssl-train: {run_dir} cannot be locked ({error.strerror}): do not start a second run in it",
                    to_stderr=True,
                )
                return file
            if time.monotonic() > until:
                file.seek(0)
                raise ConfigError(
                    f"another run ({file.read().strip() or 'unknown'}) is running in {run_dir}: "
                    "wait for it, or choose another run_dir"
                ) from error
            time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
