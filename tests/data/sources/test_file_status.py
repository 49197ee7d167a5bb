"""Sizes and modification times of many files, with and without threads."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from sslcli.data.sources import file_status
from sslcli.data.sources.file_status import UNREADABLE, hashes_of, status_of


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """600 files, of which the third does not exist."""
    paths = [tmp_path / f"{number}.bin" for number in range(600)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number % 256]) * number)
        os.utime(path, ns=(number, 1000 + number))
    paths[2].unlink()
    return list(map(str, paths))


@pytest.mark.parametrize("slow", [False, True])
def test_sizes_and_times_come_in_order_from_fast_and_slow_file_systems(
    files: list[str], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_status, "_SLOW_CALL", -1.0 if slow else 60.0)
    progress: list[tuple[int, int]] = []
    sizes, stamps = status_of(len(files), files.__getitem__, lambda done, total: progress.append((done, total)))
    wanted = np.arange(600)
    wanted[2] = -1
    assert sizes.tolist() == wanted.tolist()
    assert stamps.tolist() == np.where(wanted < 0, -1, 1000 + wanted).tolist()
    assert progress == [(600, 600)]
    hashes = hashes_of(len(files), files.__getitem__)
    assert hashes[2] == UNREADABLE
    assert len(set(hashes.tolist())) == 600
    assert hashes.tolist() == [file_status._hash_of_file(path) for path in files]


def test_a_slow_file_system_is_asked_by_many_threads_at_once() -> None:
    def slow(number: int) -> str:
        time.sleep(0.002)
        return os.devnull

    start = time.monotonic()
    status_of(2048, slow)
    assert time.monotonic() - start < 2.5  # one after the other takes 4.1 s


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    start = time.monotonic()
    assert hashes_of(1, lambda _: str(tmp_path / "pipe")).tolist() == [UNREADABLE]
    assert time.monotonic() - start < 5
