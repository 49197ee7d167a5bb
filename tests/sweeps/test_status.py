"""Status of jobs, and the right to run them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from small_sweeps import prepared_sweep, wait_until
from sslcli.config.yaml_files import as_yaml
from sslcli.sweeps import job as _job
from sslcli.sweeps import status as _status
from sslcli.sweeps import sweep as _sweep
from sslcli.sweeps import table
from sslcli.sweeps.job import Length, Record
from sslcli.sweeps.status import CHECKED, FINISHED, RUNNING, STOPPED, SUBMITTED, status_of


@pytest.mark.parametrize("proc", ["/proc", "/nowhere"])
def test_a_process_is_known_without_locks_too(proc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_status, "PROC", Path(proc))
    job = subprocess.Popen([sys.executable, "-S", "-c", "input()", "seed=1"], stdin=subprocess.PIPE)

    def is_alive(*overrides: str) -> bool:
        here = os.uname().nodename
        return _status._is_alive(Record(overrides=list(overrides), run_dir=None, host=here, process=job.pid))

    wait_until(lambda: is_alive("seed=1"), "the process is known")
    assert is_alive("seed=2") == (proc != "/proc")
    job.communicate(b"\n")
    assert not is_alive("seed=1")


def test_a_dry_run_of_a_job_does_not_count_as_the_run(tmp_path: Path) -> None:
    sweep, job = prepared_sweep(tmp_path)
    _job.record_start(sweep, job, 1)
    _job.record_end(sweep, job, 0)
    (row,) = table.update(sweep)
    assert row.status == CHECKED
    assert _sweep.exit_code([row], stopped=False) == 0
    assert _status.is_due(sweep, job)
    (tmp_path / "one/slurm").mkdir(parents=True)
    (tmp_path / "one/slurm/job").write_text("7\n")
    assert status_of(sweep, "one", _job.read_or_create_record(sweep, job)) == SUBMITTED


def test_the_right_to_run_a_job_is_one_process_alone(tmp_path: Path) -> None:
    sweep, job = prepared_sweep(tmp_path)
    right = _status.claim_job(sweep, job)
    assert right is not None
    assert _status.claim_job(sweep, job) is None
    assert status_of(sweep, "one", _job.read_or_create_record(sweep, job)) == RUNNING
    right.close()
    again = _status.claim_job(sweep, job)
    assert again is not None
    again.close()


def test_a_job_is_finished_once_its_run_has_the_length_of_the_job(tmp_path: Path) -> None:
    sweep, job = prepared_sweep(tmp_path)
    run_dir = tmp_path / "one"
    run_dir.mkdir()
    stored = {
        "seed": 0,
        "method": {"_target_": "sslcli.methods.byol.BYOL"},
        "train": {"epochs": 2, "max_steps": None},
        "effective": {"steps": 20, "steps per epoch": 10},
    }
    (run_dir / "config.yaml").write_text(as_yaml(stored))
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints/step-00000020.pt").touch()
    (run_dir / "done").touch()
    _job.record_end(sweep, job, 0)

    def status(epochs: int = 2, max_steps: int | None = None) -> str:
        _job.record_settings(sweep, replace(job, length=Length(epochs, max_steps, "rescale")))
        return status_of(sweep, "one", _job.read_or_create_record(sweep, job))

    assert (status(), status(max_steps=20)) == (FINISHED, FINISHED)
    assert (status(epochs=3), status(max_steps=21)) == (STOPPED, STOPPED)
    assert _status.is_due(sweep, job)
    (run_dir / "done").unlink()
    assert status() == CHECKED
    stored["effective"] |= {
        "phases": [{"start": 0, "total": 20, "extend": "rescale"}, {"start": 20, "total": 30, "extend": "rescale"}]
    }
    (run_dir / "config.yaml").write_text(as_yaml(stored | {"train": {"epochs": 3, "max_steps": None}}))
    assert (status(), status(epochs=3)) == (FINISHED, CHECKED)
    (run_dir / "done").touch()
    assert (status(), status(epochs=3)) == (FINISHED, FINISHED)
    (run_dir / "config.yaml").write_text("[")
    assert status(epochs=4) == FINISHED
