"""Names of runs: the default run directory, and a digest of the overrides that affect the results."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping

from sslcli.config.moved import old_override
from sslcli.config.run_config import RunConfig
from sslcli.config.settings import NEUTRAL
from sslcli.errors import ConfigError

MAX_NAME_BYTES = 255  # limit of all usual file systems
MAX_PATH_BYTES = (
    4095 - 300
)  # PATH_MAX of Linux (4096), minus 1 for the terminating zero byte, minus 300 for paths inside the run directory


def run_dir_of(config: RunConfig) -> str:
    """Return the absolute run directory: `run_dir` if it is set, else runs/<name>.

    Raises ConfigError if the file system cannot store a directory with this name.
    """
    if config.run_dir is not None:
        _check_path("run_dir", config.run_dir)
        return os.path.abspath(config.run_dir)
    if config.name:
        _check_name(config.name)
    run_dir = os.path.abspath(os.path.join("runs", config.name or default_name(config.choices, config.digest)))
    _check_path("name" if config.name else "run_dir", run_dir)
    return run_dir


def _check_name(name: str) -> None:
    """Raise ConfigError unless `name` is a path below runs/."""
    if os.path.isabs(name) or any(part in ("", ".", "..") for part in name.split("/")):
        raise ConfigError(
            f"name is {name!r}, but it must name a directory below runs/, as in name=mine or name=group/mine: choose "
            "another name, or set the whole path with run_dir"
        )


def _check_path(key: str, path: str) -> None:
    """Raise ConfigError if `path` contains a NUL character, or if the path or one of its parts is too long.

    `key` is the setting that the message names.
    """
    if "\0" in path:
        raise ConfigError(f"{key} is {path!r}, but a path cannot contain the NUL character: remove it")
    longest = max((os.fsencode(part) for part in path.split("/")), key=len)
    if len(longest) > MAX_NAME_BYTES:
        raise ConfigError(
            f"{key} contains the name {_shortened(os.fsdecode(longest))}, which has {len(longest)} bytes, but the name "
            f"of a directory has at most {MAX_NAME_BYTES}: choose a shorter {key}"
        )
    whole = len(os.fsencode(os.path.abspath(path)))
    if whole > MAX_PATH_BYTES:
        raise ConfigError(
            f"{key} is {_shortened(path)}, a path of {whole} bytes, but the files of a run need a path of at most "
            f"{MAX_PATH_BYTES}: choose a shorter run_dir"
        )


def _shortened(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:37]}..."


def default_name(choices: Mapping[str, str], digest: str) -> str:
    """Return the name METHOD_DATASET_BACKBONE_DIGEST. If `digest` is "", the name ends after the backbone.

    `choices` maps each config group, such as "method", to the chosen name, such as "simclr".
    """
    parts = [choices["method"], choices["dataset"], choices["backbone"], digest]
    return "_".join(part for part in parts if part)


def digest_of(lines: Iterable[str]) -> str:
    """Return a digest (six hex digits) of the overrides that affect the results, or "" if there are none.

    `lines` are all overrides of a command. The name of the default run directory contains the digest, so that the same
    command uses the same directory.
    """
    found = result_overrides(lines)
    return hashlib.sha256("\n".join(found).encode("utf-8", "surrogatepass")).hexdigest()[:6] if found else ""


def result_overrides(lines: Iterable[str]) -> list[str]:
    """Return the overrides that affect the results, sorted. `lines` are all overrides of a command.

    Some keys and choices were renamed after version 0.1. The returned overrides contain the names of version 0.1, so
    that the digest of a command is the same in all versions.
    """
    return sorted(old_override(line) for line in lines if not _is_neutral(line.partition("=")[0].lstrip("+~")))


def _is_neutral(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in (*NEUTRAL, "hydra")) or key.startswith("hydra/")
