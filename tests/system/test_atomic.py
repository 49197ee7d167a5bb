from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sslcli.system import atomic
from sslcli.system.atomic import replace, write


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    replace(path, b"old")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_writer_of_the_same_file_does_not_disturb_the_first(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"

    def slowly(temporary: Path) -> None:
        temporary.write_bytes(b"first")
        replace(path, b"second")
        assert path.read_bytes() == b"second"

    write(path, slowly)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path: Path) -> None:
    for name in ("a" * 255, "\N{SNOWMAN}" * 85):
        replace(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"


def leftovers(folder: Path) -> dict[str, Path]:
    """A temporary file of each kind of writer."""
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    here, elsewhere = atomic.machine(), "0" * 8
    found = {
        "killed": folder / f"config.yaml.{here}-{ended.pid}-00000000.tmp",
        "at work": folder / f"config.yaml.{here}-{os.getppid()}-00000000.tmp",
        "elsewhere": folder / f"config.yaml.{elsewhere}-{ended.pid}-00000000.tmp",
        "elsewhere, long ago": folder / f"config.yaml.{elsewhere}-{ended.pid}-00000001.tmp",
        "of the user": folder / "mine.tmp",
        "of nobody": folder / f"config.yaml.{here}-99999999999999999999-00000000.tmp",
    }
    for path in found.values():
        path.touch()
    long_ago = time.time() - 2 * atomic.ABANDONED
    for name in ("elsewhere, long ago", "of the user"):
        os.utime(found[name], (long_ago, long_ago))
    return found


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    found = leftovers(tmp_path)
    replace(tmp_path / "config.yaml", b"new")
    gone = {name for name, path in found.items() if not path.exists()}
    assert gone == {"killed", "elsewhere, long ago"}


def test_a_folder_that_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    folder = leftovers(tmp_path)["killed"]
    folder.unlink()
    folder.mkdir()
    (folder / "part").touch()
    replace(tmp_path / "other", b"new")
    assert not folder.exists()


def test_temporary_files_of_the_first_version_are_removed_after_a_day(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".a.pt.12.part", ".b.pt.13.part", "own.part"))
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (1.0, 1.0))
    replace(tmp_path / "c", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.pt.13.part", "c", "own.part"]
