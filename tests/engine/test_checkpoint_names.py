"""Naming rule of checkpoints, which the script of a Slurm job uses as well."""

from __future__ import annotations

import re
from pathlib import Path

import sslcli
from sslcli.engine.checkpoint_names import all_of, step_of
from sslcli.runs import directory, launch

WHOLE = ["step-00000009.pt", "step-00000010", "step-100000000.pt"]
OTHERS = [
    "step-00000011.0a0b0c0d-77-0a0b0c0d.tmp",
    "step-00000012.tmp",
    "step-00000012.pt.tmp",
    "step-00000009.sha256",
    "step-x.pt",
    "step-.pt",
    "last",
]


def make(run_dir: Path, *names: str) -> None:
    for name in names:
        (run_dir / "checkpoints" / name).mkdir(parents=True)


def test_files_and_folders_are_found_oldest_first_and_nothing_half_written(tmp_path: Path) -> None:
    make(tmp_path, *WHOLE, *OTHERS)
    found = all_of(tmp_path)
    assert [path.name for path in found] == WHOLE
    assert [step_of(path) for path in found] == [9, 10, 100000000]


def test_a_run_of_sharded_checkpoints_has_some_to_go_on_from(tmp_path: Path) -> None:
    make(tmp_path, *OTHERS)
    assert not directory.has_checkpoint(tmp_path)
    assert launch.checkpoints({"run_dir": str(tmp_path)}) == set()
    make(tmp_path, "step-00000010")
    assert directory.has_checkpoint(tmp_path)
    assert launch.checkpoints({"run_dir": str(tmp_path)}) == {"step-00000010"}


def test_no_other_module_knows_the_names() -> None:
    package = Path(sslcli.__file__).parent
    others = [path for path in [*package.rglob("*.py"), *package.rglob("*.sh")] if path.name != "checkpoint_names.py"]
    code = {path: re.sub(r'""".*?"""', "", path.read_text("utf-8"), flags=re.DOTALL) for path in others}
    assert [path.name for path, text in code.items() if re.search(r'"checkpoints"|checkpoints/|"step-\[', text)] == []
    assert "checkpoint_names.PATTERN" in (package / "runs/slurm_job.py").read_text("utf-8")
