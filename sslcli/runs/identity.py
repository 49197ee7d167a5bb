"""Names of runs: the default run directory, and a digest of the overrides that determine the results."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping

from sslcli.config.moved import old_override
from sslcli.config.run_config import RunConfig
from sslcli.config.settings import NEUTRAL


def run_dir_of(config: RunConfig) -> str:
    """The run directory, absolute: the one given, or runs/<name>."""
    given = config.run_dir
    name = config.name or default_name(config.choices, config.digest)
    return os.path.abspath(given if given is not None else os.path.join("runs", name))


def default_name(choices: Mapping[str, str], digest: str) -> str:
    """Method, data set and backbone, and a digest of what the command line changed."""
    parts = [choices["method"], choices["dataset"], choices["backbone"], digest]
    return "_".join(part for part in parts if part)


def digested(lines: Iterable[str]) -> str:
    """Six hex digits of the overrides that make a run what it is, so that the same command finds its directory."""
    found = telling(lines)
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:6] if found else ""


def telling(lines: Iterable[str]) -> list[str]:
    """The overrides that make a run what it is, in an order of their own."""
    return sorted(old_override(line) for line in lines if not _is_neutral(line.partition("=")[0].lstrip("+~")))


def _is_neutral(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in (*NEUTRAL, "hydra")) or key.startswith("hydra/")
