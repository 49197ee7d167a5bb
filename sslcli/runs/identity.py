"""Names of runs: the default run directory, and a digest of the overrides that affect the results."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping

from sslcli.config.moved import old_override
from sslcli.config.run_config import RunConfig
from sslcli.config.settings import NEUTRAL


def run_dir_of(config: RunConfig) -> str:
    """Return the absolute run directory: `run_dir` if it is set, else runs/<name>."""
    if config.run_dir is not None:
        return os.path.abspath(config.run_dir)
    return os.path.abspath(os.path.join("runs", config.name or default_name(config.choices, config.digest)))


def default_name(choices: Mapping[str, str], digest: str) -> str:
    """Return the name METHOD_DATASET_BACKBONE_DIGEST. If `digest` is "", the name ends after the backbone."""
    parts = [choices["method"], choices["dataset"], choices["backbone"], digest]
    return "_".join(part for part in parts if part)


def digest_of(lines: Iterable[str]) -> str:
    """Return a digest (six hex digits) of the overrides that affect the results, or "" if there are none.

    The name of the default run directory contains the digest, so that the same command uses the same directory.
    """
    found = result_overrides(lines)
    return hashlib.sha256("\n".join(found).encode("utf-8", "surrogatepass")).hexdigest()[:6] if found else ""


def result_overrides(lines: Iterable[str]) -> list[str]:
    """Return the overrides that affect the results, sorted, with keys and choices named as in version 0.1."""
    return sorted(old_override(line) for line in lines if not _is_neutral(line.partition("=")[0].lstrip("+~")))


def _is_neutral(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in (*NEUTRAL, "hydra")) or key.startswith("hydra/")
