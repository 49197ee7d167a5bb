"""Records, status and right to run of the jobs of a sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from small_sweeps import prepared_sweep, wait_until
from sslcli.sweeps import job as _job
from sslcli.sweeps import sweep as _sweep
from sslcli.sweeps import table
from sslcli.sweeps.job import CHECKED, RUNNING, SUBMITTED, Record, read, status_of, write
from sslcli.system.stored import DamagedFile


@pytest.mark.parametrize("proc", ["/proc", "/nowhere"])
def test_a_process_is_known_without_locks_too(proc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_job, "PROC", Path(proc))
    job = subprocess.Popen([sys.executable, "-S", "-c", "input()", "seed=1"], stdin=subprocess.PIPE)

    def is_alive(*overrides: str) -> bool:
        here = os.uname().nodename
        return _job._is_alive(Record(overrides=list(overrides), run_dir=None, host=here, process=job.pid))

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
    assert _job.is_due(sweep, job)
    (tmp_path / "one/slurm").mkdir(parents=True)
    (tmp_path / "one/slurm/job").write_text("7\n")
    assert status_of(sweep, "one", _job.read_or_create_record(sweep, job)) == SUBMITTED


def test_the_right_to_run_a_job_is_one_process_alone(tmp_path: Path) -> None:
    sweep, job = prepared_sweep(tmp_path)
    right = _job.claim_job(sweep, job)
    assert right is not None
    assert _job.claim_job(sweep, job) is None
    assert status_of(sweep, "one", _job.read_or_create_record(sweep, job)) == RUNNING
    right.close()
    again = _job.claim_job(sweep, job)
    assert again is not None
    again.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"\xff", b'{"overrides": 3, "run_dir": null}', b'{"overrides": [1], "run_dir": null}'],
)
def test_a_damaged_record_is_refused_with_its_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"a\.json is damaged \(.*\): remove it, or choose another hydra\.sweep\.dir"):
        read(path)
    write(path, Record(overrides=["seed=1"], run_dir=None, code=-9))
    assert read(path) == Record(overrides=["seed=1"], run_dir=None, code=-9)
