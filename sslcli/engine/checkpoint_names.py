"""Folder and file names of checkpoints. Only this module defines these names; it does not import torch."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "checkpoints"  # in the run directory
PATTERN = r"step-[0-9]+(\.pt)?"  # a file, or a folder of shards; temporary names do not match


def folder(run_dir: Path) -> Path:
    """Return the checkpoint folder of a run."""
    return run_dir / FOLDER


def path_of(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint file after `step` optimizer steps.

    If parameters are sharded, the checkpoint is a folder instead. The path of the folder is the returned path without
    the suffix `.pt`.
    """
    return folder(run_dir) / f"step-{step:08d}.pt"


def all_of(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in folder(run_dir).glob("step-*") if re.fullmatch(PATTERN, path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def step_of(path: Path) -> int:
    """Read the step of a checkpoint from its file name."""
    return int(path.stem.removeprefix("step-"))
