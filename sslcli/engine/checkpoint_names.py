"""File names of checkpoints, without importing torch; `slurm/job.sh` has the same rule."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINT = re.compile(r"step-([0-9]+)(\.pt)?")  # a file, or a folder of shards; temporary names have another suffix


def all_of(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoints/step-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def step_of(path: Path) -> int:
    """Return the step of a checkpoint from its file name."""
    return int(path.stem[5:])
