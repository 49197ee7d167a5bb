"""Locks of files."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sslcli.system.locks import can_lock, lock, locked


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    can_lock.cache_clear()
    yield
    can_lock.cache_clear()


def refuse(number: int) -> Any:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_a_lock_is_free_again_once_its_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    held = lock(path)
    assert held is not None
    assert lock(path) is None
    held.close()
    again = lock(path)
    assert again is not None
    again.close()


HOLD = """
import sys
from pathlib import Path
from sslcli.system.locks import lock
held = lock(Path(sys.argv[1]))
print("held" if held else "taken", flush=True)
input()
"""


def test_a_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    line = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert lock(path) is None
    process.kill()
    process.wait()
    held = lock(path)
    assert held is not None
    held.close()


def test_a_block_waits_until_the_lock_is_free(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    held = lock(path)
    assert held is not None
    ending = threading.Timer(0.3, held.close)
    ending.start()
    before = time.monotonic()
    with locked(path):
        assert time.monotonic() - before > 0.2
        assert lock(path) is None
    ending.join()
    free = lock(path)
    assert free is not None
    free.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_grants_every_lock(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    first, second = lock(tmp_path / "a.lock"), lock(tmp_path / "a.lock")
    assert first is not None
    assert second is not None
    first.close()
    second.close()
    with locked(tmp_path / "a.lock"):
        pass
    assert not can_lock(tmp_path)


def test_other_errors_of_a_lock_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "a.lock"):
        pass


def test_a_usual_folder_has_locks(tmp_path: Path) -> None:
    assert can_lock(tmp_path)
