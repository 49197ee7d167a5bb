from __future__ import annotations

import errno
import os
from pathlib import Path

from sslcli.runs.failures import has_own_message


def test_only_a_missing_file_of_the_run_counts_as_deleted(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    missing = [run_dir / "tensorboard/events", tmp_path / "images.csv"]
    errors = [FileNotFoundError(errno.ENOENT, "No such file", os.fsencode(path)) for path in missing]
    for exists in (False, True):
        assert [has_own_message(run_dir, error) for error in errors] == [True, False]
        if not exists:
            run_dir.mkdir()
    assert not has_own_message(run_dir, FileNotFoundError(errno.ENOENT, "No such file"))
    assert not has_own_message(run_dir, PermissionError(errno.EACCES, "denied", str(missing[0])))
