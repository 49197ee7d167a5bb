"""Search for a shorter run with the same settings. A command can extend this run instead of starting a new run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sslcli.config.comparison import changed_settings
from sslcli.config.run_config import RunConfig
from sslcli.engine.phases import LENGTH_KEYS
from sslcli.errors import ConfigError
from sslcli.runs import directory, length
from sslcli.runs.identity import result_overrides
from sslcli.system.regular_files import read_regular

MAX_RUNS = 500  # newest runs whose overrides are read; reading them takes less than 0.1 s
MAX_BYTES = 1_000_000  # maximum size of an overrides.txt that is read


def shorter_run_hint(config: RunConfig) -> str | None:
    """Return a line that names the longest finished run that a command could extend, or None if there is none.

    `config` is the configuration of the command, which would start a new run.

    The search covers the runs in the parent folder of the run directory, and the runs of the sweeps in the same parent
    folder. A run is accepted if all of its overrides except the length equal the overrides of `config`. If the run of
    `config` has already started, None is returned.
    """
    run_dir = config.directory
    if (run_dir / "config.yaml").exists() or config.resume == "must":
        return None
    wanted = _without_length(config.overrides)
    found: list[tuple[int, Path]] = []
    for other in _runs_beside(run_dir):
        with suppress(OSError, ConfigError):
            text = read_regular(other / "overrides.txt", most=MAX_BYTES).decode("utf-8", "surrogateescape")
            if _without_length(text.splitlines()) == wanted and _is_shorter(other, config):
                found.append((length.newest_step(other), other))
    if not found:
        return None
    step, other = max(found)
    place = os.path.relpath(other) if other.is_relative_to(Path.cwd()) else str(other)
    return (
        f"{place} is a finished run of {step:,} steps with the same settings: to continue it instead of starting at "
        f"step 0, add run_dir={place}"
    )


def _runs_beside(run_dir: Path) -> Iterator[Path]:
    """Yield finished runs in the parent folder of `run_dir` and in the sweeps in that folder, newest first.

    `run_dir` itself and symbolic links to runs are omitted.
    """
    parent = run_dir.parent
    finished = [*parent.glob("*/done"), *parent.glob("sweep_*/*/done")]
    with suppress(OSError):  # a run was deleted after it had been listed
        finished.sort(key=lambda path: -path.stat().st_mtime_ns)
    return (path.parent for path in finished[:MAX_RUNS] if path.parent != run_dir and not path.parent.is_symlink())


def _without_length(overrides: list[str]) -> list[str]:
    """Return the overrides that affect the results, except the overrides of the length of a run."""
    return [line for line in result_overrides(overrides) if line.partition("=")[0].lstrip("+~") not in LENGTH_KEYS]


def _is_shorter(run_dir: Path, config: RunConfig) -> bool:
    """Return True if the run in `run_dir` has the settings of `config`, but fewer steps."""
    stored = directory.read_config(run_dir)
    total, phases = length.requested_steps(stored, config.values), length.stored_phases(stored)
    if total is None or not phases or phases[-1].total >= total or not length.newest_step(run_dir):
        return False
    return not changed_settings(stored, config.values, may_differ=LENGTH_KEYS)
