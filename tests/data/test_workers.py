"""sslcli/data/workers.py: how many data workers there are, and how they end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from torch.utils.data import Dataset

from sslcli.data.sources import Source
from sslcli.data.workers import batches_of, list_of, workers_that_pay
from sslcli.errors import ProcessLost


class Deadly(Dataset[int]):
    """Kills the process that asks for item 1."""

    def __getitem__(self, item: int) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


@pytest.fixture
def watched() -> Iterator[None]:
    """What torch does when a child ends is put back afterwards."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("watched")
def test_a_worker_that_died_is_told_once() -> None:
    """torch's handler would raise again while the other worker is taken down, inside of whatever runs then."""
    with pytest.raises(ProcessLost, match=r"a data worker died .* lower dataset.workers"):
        list(batches_of(Deadly(), list_of(iter(range(8))), 2))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("cores", "processes", "gpu", "image_size", "expected"),
    [
        (2, None, False, 32, 0),
        (2, None, False, 64, 0),
        (2, None, False, 65, 2),
        (3, None, False, 32, 2),
        (8, 4, False, 32, 0),
        (1, None, True, 32, 1),
        (4, None, True, 224, 3),
        (64, 4, True, 224, 8),
        (8, 4, True, 224, 1),
    ],
)
def test_the_workers_that_pay(
    cores: int, processes: int | None, gpu: bool, image_size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    if processes is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers_that_pay(image_size) == expected
    assert Source(image_size=image_size, workers=None).workers == expected
