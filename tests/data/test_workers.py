"""sslcli/data/workers.py: how data workers end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from torch.utils.data import Dataset

from sslcli.data.workers import batches_of, list_of
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
