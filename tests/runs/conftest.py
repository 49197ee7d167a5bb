"""Fixtures of the tests that submit runs to Slurm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slurm_site import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Site:
    """With an sbatch that accepts, and a squeue that knows the job as running."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(sys, "path", list(sys.path))
    site = Site(tmp_path, monkeypatch, capfd)
    site.write("sbatch", f'echo "$@" >>{tmp_path}/submitted; echo 41')
    site.write("squeue", f"echo RUNNING {tmp_path}/run/slurm/job.sbatch")
    return site
