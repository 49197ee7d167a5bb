"""Processes that read images for a run: what they are asked for in order, and how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sslcli import cores
from sslcli.distributed import end_with
from sslcli.errors import ConfigError, ProcessLost

MOST, ON_THE_CPU = 8, 2
SMALL, FEW_CORES = 64, 2  # pixels a side, cores of a process


def workers_that_pay(image_size: int) -> int:
    """Processes that decode where `dataset.workers` is null; docs/performance.md has what was measured.

    Beside a GPU, all cores of this process but one, at most 8. On the CPU they take cores from the network, so 2, and
    none where small images, of at most 64 pixels a side, leave them little to do on 1 or 2 cores.
    """
    if torch.cuda.is_available():
        return min(MOST, max(1, cores.share() - 1))
    return 0 if image_size <= SMALL and cores.share() <= FEW_CORES else ON_THE_CPU


class Told(Dataset[Any]):
    """Hands over what is wrong with the user's data: raised in a worker, it would arrive as the text of a traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.dataset[request]
        except ConfigError as error:
            return error


class list_of:
    """A generator as a sampler that can be started anew."""

    def __init__(self, requests: Iterator[Any]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Any]:
        return self.requests


def batches_of(dataset, sampler, workers: int):  # type: ignore[no-untyped-def]
    """`dataset[request]` for each request, in order, by `workers` processes (0: in this one)."""
    loader = DataLoader(
        Told(dataset),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(start_worker, os.getpid()),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # see start_worker
        generator=torch.Generator(),  # else a number is drawn from the global one, which a resumed run would draw twice
    )
    try:
        for served in loader:
            if isinstance(served, Exception):
                raise served
            yield served
    except (RuntimeError, ConnectionError, EOFError) as error:
        if "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError)):
            forget_workers()
            raise worker_died(error) from error
        raise


def start_worker(parent: int, number: int) -> None:
    """Make a data worker leave signals to the process it works for, and end with it.

    Schedulers and terminals signal the whole process group: a worker that dies of it would turn a stop in good order
    into a failure. One that outlived its run would hold the lock of the run directory, which it inherits by fork.
    Python's newer start methods put a server between the run and its workers, which nothing would end with the run.
    """
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    end_with(parent)


def forget_workers() -> None:
    """Let the other workers end unwatched: torch would report the dead one again, in the midst of taking them down."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def worker_died(error: BaseException) -> ProcessLost:
    """The message for a data worker that vanished."""
    return ProcessLost(
        f"a data worker died ({str(error).splitlines()[0]}). The usual cause is too little memory: "
        "lower dataset.workers (0 reads in the main process) and start the same command again to go on"
    )
