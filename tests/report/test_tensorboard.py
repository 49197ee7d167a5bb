"""TensorBoard files in folders whose names are not UTF-8."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sslcli.report.tensorboard import open_writer, utf8_path


def test_an_ordinary_path_is_passed_unchanged(tmp_path: Path) -> None:
    assert utf8_path(tmp_path / "ä") == str(tmp_path / "ä")
    assert not (tmp_path / "ä").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are not UTF-8")
def test_events_are_written_to_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"run\xff") / "tensorboard"
    writer = open_writer(folder, purge_step=0)
    writer.add_scalar("train/loss", 1.0, 1)
    writer.flush()
    (file,) = folder.iterdir()
    written = file.stat().st_size
    writer.add_scalar("train/loss", 2.0, 2)
    writer.close()
    assert file.stat().st_size > written > 0
