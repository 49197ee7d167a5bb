"""The run directory: who may use it, what it must agree with, what it tells about its run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from sslcli.config.moved import current_config
from sslcli.config.paths import map_paths, real_path
from sslcli.config.settings import NEUTRAL
from sslcli.config.yaml_files import as_yaml, load_yaml
from sslcli.engine import checkpoint_names
from sslcli.errors import ConfigError
from sslcli.system import atomic
from sslcli.system.locks import NO_LOCKS
from sslcli.system.regular_files import kind_of

WRITTEN = (checkpoint_names.FOLDER, "tensorboard", "metrics.jsonl", "console.log")  # while a run goes on


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
FOLDERS = (checkpoint_names.FOLDER, "eval", "export", "pictures", "slurm", "tensorboard")


def check_layout(run_dir: Path) -> None:
    """Raise ConfigError where something lies in a run directory that would hold up or end whoever opens it.

    That is a FIFO, a socket or a device in the place of a file, a file in the place of a folder, and the other way.
    Only the log, which is never read, may be a device: some want it to go to /dev/null.
    """
    for name in FILES:
        path = run_dir / name
        is_device = name == "console.log" and path.is_char_device()
        if path.exists() and not path.is_file() and not is_device:
            raise ConfigError(out_of_place(run_dir / name))
    for name in FOLDERS:
        if (run_dir / name).exists() and not (run_dir / name).is_dir():
            raise ConfigError(f"{run_dir / name} is {kind_of(run_dir / name)}, but it must be a folder: remove it")
        check_below(run_dir / name)


def check_below(folder: Path) -> None:
    """Raise ConfigError where a folder, at any depth, holds what is neither a file nor a folder."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.exists() and not path.is_file():
                raise ConfigError(out_of_place(path))


def out_of_place(path: Path) -> str:
    """The message for what lies in the place of a file."""
    return f"{path} is {kind_of(path)}, but it must be a regular file: remove it"


def is_finished(run_dir: Path) -> bool:
    """Whether the run in this directory came to its end."""
    return (run_dir / "done").exists()


def is_held(run_dir: Path) -> bool:
    """Whether a run is at work in this directory."""
    try:
        with (run_dir / ".lock").open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno not in NO_LOCKS
    return False


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is something to go on from, told without importing torch."""
    return bool(checkpoint_names.all_of(run_dir))


def check_resumable(run_dir: Path, values: dict[str, Any]) -> None:
    """Raise ConfigError unless a run with these settings (`RunConfig.values`) may start or resume in `run_dir`."""
    started = (run_dir / "config.yaml").exists()
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir is {run_dir}, but that is a file: choose a directory")
    check_layout(run_dir)
    if values["resume"] == "never" and started:
        raise ConfigError(
            f"resume is 'never', but {run_dir} holds a run: choose another run_dir or name, or resume=auto to go on"
        )
    if values["resume"] == "must" and not has_checkpoint(run_dir):
        raise ConfigError(
            f"resume is 'must', but {run_dir} holds no checkpoint: check run_dir, or start with resume=auto"
        )
    if not started:
        return
    before, now = (flat(map_paths(each, real_path)) for each in (read_config(run_dir), values))
    changed = [
        f"{key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"the run in {run_dir} was started with another configuration; what differs: {'; '.join(changed)}. "
            "Use the same values to go on, or another run_dir to start anew"
        )


def flat(config: dict[str, Any], prefix: str = "", *, leave_out: tuple[str, ...] = NEUTRAL) -> dict[str, Any]:
    """Values by dotted key of what makes a run what it is: all but those in `leave_out` and below."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if (key.startswith("_") and not prefix) or path in leave_out or path == "effective":
            continue
        if isinstance(value, dict):
            found |= flat(value, f"{path}.", leave_out=leave_out)
        else:
            found[path] = value
    return found


def read_config(run_dir: Path) -> dict[str, Any]:
    """The configuration a run was started with. Raises ConfigError where there is none."""
    path = run_dir / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{run_dir} is not a run directory: it has no config.yaml")
    check_layout(run_dir)
    config = load_yaml(path)
    if not isinstance(config, dict) or "method" not in config:
        raise ConfigError(f"{path} is not the configuration of a run")
    return current_config({str(key): value for key, value in config.items()})[0]


def lock(run_dir: Path, *, patience: float = 3.0) -> IO[str]:
    """Take the run directory for this process until it ends, making it where needed.

    Waits a moment for the processes of a run that was just killed. Raises ConfigError when another run holds it. Says
    so and goes on where the file system has no locks.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run_dir is {run_dir}, but it cannot be written ({error.strerror}): choose another"
        ) from error
    for path in (run_dir, *(run_dir / name for name in WRITTEN)):
        if path.exists() and not os.access(path, os.W_OK, effective_ids=True):
            raise ConfigError(
                f"{path} cannot be written ({os.strerror(errno.EACCES)}), where the run would go on: change its "
                "permissions, or copy the run to a place of your own"
            )
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(
                    f"ssl-train: {run_dir} cannot be locked ({error.strerror}): start no second run in it",
                    file=sys.stderr,
                )
                return file
            if time.monotonic() > until:
                file.seek(0)
                raise ConfigError(
                    f"another run ({file.read().strip() or 'unknown'}) is at work in {run_dir}: "
                    "wait for it, or choose another run_dir"
                ) from error
            time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def describe(
    run_dir: Path,
    values: dict[str, Any],
    *,
    overrides: list[str],
    effective: dict[str, Any],
    device: str,
    threads: int,
) -> None:
    """Write what explains the run: configuration, command line, environment."""

    path = run_dir / "overrides.txt"
    if not path.exists():
        atomic.replace(path, "".join(f"{line}\n" for line in overrides).encode())
    path = run_dir / "environment.json"
    now = environment(device=device, threads=threads)
    first = json.loads(path.read_text(encoding="utf-8"))["first"] if path.exists() else now
    atomic.replace(path, json.dumps({"first": first, "latest": now}, indent=2).encode())
    atomic.replace(run_dir / "config.yaml", as_yaml(values | {"effective": effective}).encode())


def environment(*, device: str, threads: int) -> dict[str, Any]:
    """Versions, machine and code state, as plain values."""
    packages = ["sslcli", "torch", "torchvision", "hydra-core", "omegaconf", "numpy", "pillow"]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "host": platform.node(),
        "device": device,
        "threads": threads,
        "git": git(),
    }


def git() -> dict[str, Any] | None:
    """Commit and cleanness of the repository the command was started in, None where there is none."""
    if shutil.which("git") is None:
        return None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode != 0:
        return None
    status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip(), "changed_files": len(status.stdout.splitlines())}
