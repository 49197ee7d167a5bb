"""Data workers: errors and end."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.data import Dataset

from sslcli.data import workers as _workers
from sslcli.data.num_workers import BatchMemory
from sslcli.data.sources.base import Source
from sslcli.data.workers import iterate_batches
from sslcli.errors import BUG, ConfigError, ProcessLost, TrainingFailed


class Deadly(Dataset[int]):
    """Kills the process that asks for item 1."""

    def __getitem__(self, item: int) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


class Stuck(Dataset[int]):
    """Blocks forever at item 1."""

    def __getitem__(self, item: int) -> int:
        while item == 1:
            time.sleep(1)
        return item


class Failing(Dataset[int]):
    """Raises the given exception at item 1."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, item: int) -> int:
        if item == 1:
            raise self.error
        return item


class Space(NamedTuple):
    """Replace the result of os.statvfs."""

    f_bavail: int
    f_blocks: int
    f_frsize: int


def read(dataset: Dataset[int], *, workers: int = 2, owner: type = Source, timeout: float = 60) -> list[int]:
    return list(iterate_batches(dataset, range(8), workers, owner=owner, timeout=timeout))


@pytest.fixture(autouse=True)
def _no_worker_stays() -> Iterator[None]:
    """Fail unless the workers of a reader end with it."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


def test_a_worker_that_died_is_told_once() -> None:
    """torch's handler would raise again while the other worker is taken down, inside of whatever runs then."""
    with pytest.raises(ProcessLost, match=r"a data worker died .* lower dataset.workers"):
        read(Deadly())
    assert callable(signal.getsignal(signal.SIGCHLD))  # torch's handler is there again, for the workers to come


class BusError(Dataset[int]):
    """Kills the process that asks for item 1, as the kernel does if shared memory is full."""

    def __getitem__(self, item: int) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGBUS)
        return item


def test_a_bus_error_is_explained_with_the_size_of_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.statvfs", lambda path: Space(1000, 15_625, 4096))
    expected = r"got a bus error. .* /dev/shm is full \(4 of 64 MB are free\).*docker run --shm-size=8g"
    with pytest.raises(ProcessLost, match=expected):
        read(BusError())


def test_a_batch_that_never_comes_ends_in_time_and_its_worker_with_it() -> None:
    start = time.monotonic()
    with pytest.raises(
        TrainingFailed, match=r"no images arrived from the data workers within 1 s \(launcher.timeout\)"
    ):
        read(Stuck(), timeout=1)
    assert time.monotonic() - start < 15


def test_workers_end_with_a_reader_that_stops_in_the_midst() -> None:
    batches = iterate_batches(Stuck(), range(8), 2, owner=Source)
    assert next(batches) == 0
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "owner", "kind", "expected"),
    [
        (KeyError("mine"), Failing, ConfigError, r"test_workers.Failing failed while reading images .*KeyError"),
        (RuntimeError("timed out"), Failing, ConfigError, r"RuntimeError: timed out(?s:.)*Traceback"),
        (MemoryError(), Failing, TrainingFailed, r"not enough memory .* lower dataset.workers"),
        (ConfigError("wrong"), Failing, ConfigError, r"^wrong$"),
    ],
    ids=str,
)
def test_any_error_reaches_the_user_with_its_traceback(
    error: Exception, owner: type, kind: type[Exception], expected: str, workers: int
) -> None:
    with pytest.raises(kind, match=expected):
        read(Failing(error), workers=workers, owner=owner)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            KeyError("ours"),
            rf"^sslcli.data.sources.base.Source failed .*KeyError(?s:.)*in __getitem__(?s:.)*\n{BUG}$",
        ),
        (OSError(errno.EIO, "Input/output error"), r"Input/output error\)\nTraceback(?s:.)*Input/output error$"),
    ],
    ids=str,
)
def test_an_error_of_sslcli_itself_is_a_failure_of_the_training(
    error: Exception, expected: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "__name__", "sslcli.data.crops")
    monkeypatch.setattr(Failing, "__module__", "sslcli.data.crops")
    with pytest.raises(TrainingFailed, match=expected):
        read(Failing(error), workers=workers, owner=Source)


def test_slots_that_do_not_fit_into_the_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("mmap.mmap", refuse)
    batches = iterate_batches(Stuck(), iter([0]), 2, owner=Source, memory=BatchMemory(1, 1000))
    with pytest.raises(TrainingFailed, match=r"2 data workers cannot be started \(Cannot allocate memory\)"):
        next(batches)


def test_workers_that_cannot_be_started_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    with pytest.raises(TrainingFailed, match=r"2 data workers cannot be started \(Resource temporarily unavailable\)"):
        read(Stuck())


SENDS_TENSORS = """
import sys
import torch
from sslcli.data.sources.base import Source
from sslcli.data.workers import iterate_batches

class Tensors(torch.utils.data.Dataset):
    def __getitem__(self, item):
        return torch.full((1000,), item)

read = iterate_batches(Tensors(), range(8), 2, owner=Source, timeout=30)
print(sum(int(tensor[0]) for tensor in read))
"""


def test_a_long_path_of_temporary_files_does_not_stop_the_workers(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    line = [sys.executable, "-c", SENDS_TENSORS]
    ended = subprocess.run(line, env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.stderr) == ("28\n", "")


def test_without_a_short_folder_the_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
    monkeypatch.setattr(_workers, "SHORT_FOLDERS", (str(tmp_path / "absent"),))
    with pytest.raises(ConfigError, match=r"longlong, but .* set the environment variable TMPDIR to a shorter path"):
        read(Deadly())
