"""Records of jobs: their own state, and the state in the record of another sweep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from small_sweeps import prepared_sweep
from sslcli.sweeps.job import (
    Length,
    Record,
    read,
    read_record,
    record_end,
    record_path,
    record_settings,
    record_start,
    write,
)
from sslcli.sweeps.status import lock_path
from sslcli.system.stored import DamagedFile


def test_the_state_of_a_job_of_two_sweeps_is_in_one_record(tmp_path: Path) -> None:
    first, job = prepared_sweep(tmp_path / "first")
    second, _ = prepared_sweep(tmp_path / "second")
    path = record_path(second, job.name)
    write(path, replace(read(path), overrides=["seed=01"], source="../../first/jobs/one.json"))
    record_start(second, job, 7)
    assert read(record_path(first, job.name)).process == 7
    record_end(first, job, 3)
    found = read_record(second, job.name)
    assert (found.code, found.process, found.overrides) == (3, None, ["seed=01"])
    assert json.loads(path.read_text())["code"] is None
    assert lock_path(second, job.name).resolve() == lock_path(first, job.name)
    record_path(first, job.name).unlink()
    assert read_record(second, job.name).code is None
    assert lock_path(second, job.name) == second.records / "one.lock"


def test_the_record_has_the_settings_of_the_last_command(tmp_path: Path) -> None:
    sweep, job = prepared_sweep(tmp_path)
    record_end(sweep, job, 0)
    record_settings(sweep, replace(job, digest="0123456789abcdef", length=Length(2, None, "decay")))
    found = read_record(sweep, job.name)
    assert (found.code, found.digest, found.epochs, found.extend) == (0, "0123456789abcdef", 2, "decay")


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
