"""Files that describe a run: config.yaml, overrides.txt and environment.json."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from sslcli.config.yaml_files import as_yaml
from sslcli.system import atomic
from sslcli.system.stored import read_json, read_or_set_aside


class Environment(TypedDict):
    """Keys of environment.json: the environments of the first start and of the latest start of the run."""

    first: dict[str, Any]
    latest: dict[str, Any]


def write_description(
    run_dir: Path,
    values: dict[str, Any],
    *,
    overrides: list[str],
    effective: dict[str, Any],
    execution: dict[str, Any],
    warn: Callable[[str], None],
) -> None:
    """Write the files that describe the run: config.yaml, overrides.txt and environment.json.

    If environment.json is damaged, the file is renamed, and `warn` is called.

    values: the configuration, for config.yaml.
    overrides: the overrides of the command line, for overrides.txt. An existing overrides.txt is not changed.
    effective: the section `effective` of config.yaml, with computed values such as the number of steps.
    execution: how steps are computed, for environment.json: device, number of CPU threads, and kind of kernels.
    """
    path = run_dir / "overrides.txt"
    if not path.exists():
        atomic.replace(path, "".join(f"{line}\n" for line in overrides).encode("utf-8", "surrogateescape"))
    path = run_dir / "environment.json"
    now = environment(execution)
    earlier = read_or_set_aside(
        partial(read_json, path, Environment, remedy="remove it"),
        warn=warn,
        consequence="the environment of the first start is unknown, so the current one takes its place",
    )
    first = now if earlier is None else earlier["first"]
    atomic.replace(path, json.dumps({"first": first, "latest": now}, indent=2).encode())
    # If this start extends a finished run, the run is not finished any more. The file `done` is removed first. If the
    # process is killed before it writes config.yaml, the next start extends the run.
    (run_dir / "done").unlink(missing_ok=True)
    atomic.replace(run_dir / "config.yaml", as_yaml(values | {"effective": effective}).encode())


def environment(execution: dict[str, Any]) -> dict[str, Any]:
    """Return date and time, command, versions, machine and state of the git repository, as plain values.

    execution: how steps are computed, such as the device and the number of CPU threads.
    """
    packages = ["sslcli", "torch", "torchvision", "hydra-core", "omegaconf", "numpy", "pillow"]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "host": platform.node(),
        **execution,
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Return the commit and the number of changed files of the git repository of the working directory.

    Return None if the working directory is not in a git repository.
    """
    if shutil.which("git") is None:
        return None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode != 0:
        return None
    status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, check=False)
    return {"commit": commit.stdout.strip(), "changed_files": len(status.stdout.splitlines())}
