"""Processes that read images for a run: what they are asked for in order, and how they end."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sslcli.errors import ConfigError, ProcessLost, TrainingFailed
from sslcli.system import cpu
from sslcli.system.child_processes import kill_with_parent

MOST, ON_THE_CPU = 8, 2
SMALL, FEW_CORES = 64, 2  # pixels a side, cores of a process
PREFETCH = 4  # batches that a worker reads ahead
PATIENCE = 600.0  # seconds to wait for a batch
LOOK = 1.0  # seconds between looks at the workers while waiting
GRACE = 1.0  # seconds that workers get to end by themselves
SHARED = "/dev/shm"
END = object()
ALIVE: set[BaseProcess] = set()
# Python waits for its child processes when it ends, and a worker may be inside a read that never ends.
atexit.register(lambda: kill(ALIVE))


def workers_that_pay(image_size: int) -> int:
    """Processes that decode where `dataset.workers` is null; docs/performance.md has what was measured.

    Beside a GPU, all cores of this process but one, at most 8. On the CPU they take cores from the network, so 2, and
    none where small images, of at most 64 pixels a side, leave them little to do on 1 or 2 cores.
    """
    if torch.cuda.is_available():
        return min(MOST, max(1, cpu.share() - 1))
    return 0 if image_size <= SMALL and cpu.share() <= FEW_CORES else ON_THE_CPU


class Reader(Dataset[Any]):
    """Reads a dataset, and gives an exception as a value: raised in a worker, it would arrive as text in another class.

    Args:
        dataset: what is read.
        owner: the class of the image set. Where it is the user's own, its errors are those of the user's code.
    """

    def __init__(self, dataset: Dataset[Any], owner: type) -> None:
        self.dataset, self.owner = dataset, owner

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.dataset[request]
        except (ConfigError, TrainingFailed) as error:
            return error
        except MemoryError:
            return TrainingFailed(
                "there is not enough memory to read the images: lower dataset.workers or train.batch_size, then start "
                "the same command again to go on"
            )
        except Exception as error:
            return self.failure(error)

    def failure(self, error: Exception) -> ConfigError | TrainingFailed:
        """The error that ends the command, with the traceback; the user's own code is a matter of configuration."""
        name = f"{self.owner.__module__}.{self.owner.__qualname__}"
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        text = f"{name} failed while images were read ({what})\n{''.join(traceback.format_exception(error)).rstrip()}"
        return TrainingFailed(text) if name.startswith("sslcli.") else ConfigError(text)


def check_shared_memory(workers: int, batch: int) -> None:
    """Raise ConfigError where `workers` cannot hand over batches of so many bytes: they die of it, or wait for ever.

    Batches go through /dev/shm (Linux), to which containers give 64 MB unless they are told otherwise.
    """
    try:
        state = os.statvfs(SHARED)
    except OSError:  # another system
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, free = batch * PREFETCH * workers * processes, state.f_bavail * state.f_frsize
    if needed > free:
        raise ConfigError(
            f"dataset.workers is {workers}, which takes about {needed / 1e6:,.0f} MB of shared memory, but {SHARED} "
            f"has {free / 1e6:,.0f} MB: give the container more (docker run --shm-size={needed / 1e9 + 1:.0f}g, or "
            "--ipc=host), read in the main process (dataset.workers=0; ssl-eval: workers=0), or lower the batch size"
        )


class list_of:
    """A generator as a sampler that can be started anew."""

    def __init__(self, requests: Iterator[Any]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Any]:
        return self.requests


def batches_of(
    dataset: Dataset[Any], sampler: Iterable[Any], workers: int, *, owner: type, patience: float = PATIENCE
) -> Generator[Any, None, None]:
    """`dataset[request]` for each request, in order, by `workers` processes (0: in this one).

    Args:
        dataset: what is read, in the workers.
        sampler: the requests.
        workers: how many processes read.
        owner: the class of the image set, see `Reader`.
        patience: seconds to wait for a batch.

    Raises ConfigError for wrong data and for an error in the user's own code, ProcessLost for a worker that died, and
    TrainingFailed where nothing comes for `patience` seconds. However it ends, its workers end with it.
    """
    loader = DataLoader(
        Reader(dataset, owner),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available(),
        timeout=LOOK if workers else 0,
        worker_init_fn=partial(start_worker, os.getpid()),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # see start_worker
        generator=torch.Generator(),  # else a number is drawn from the global one, which a resumed run would draw twice
    )
    with reading(loader, workers) as iterator:
        while (found := next_of(iterator, patience)) is not END:
            if isinstance(found, Exception):
                raise found
            yield found


@contextmanager
def reading(loader: DataLoader[Any], workers: int) -> Iterator[Iterator[Any]]:
    """What a loader gives, its workers being ended with the block. Raises as `batches_of`."""
    others = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except OSError as error:
        raise TrainingFailed(
            f"{workers} data workers cannot be started ({error.strerror or error}): lower dataset.workers (0 reads in "
            "the main process), or allow this user more processes and memory"
        ) from error
    started = [child for child in multiprocessing.active_children() if child not in others] if workers else []
    ALIVE.update(started)
    try:
        yield iterator
    except (RuntimeError, ConnectionError, EOFError) as error:
        if "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError)):
            raise worker_died(error) from error
        raise
    finally:
        if started:
            end_workers(iterator, started)


def next_of(iterator: Iterator[Any], patience: float) -> Any:
    """The next batch, or END. Raises TrainingFailed where none comes for `patience` seconds.

    The wait is cut into short ones: between them torch looks whether all workers are alive, and signals are handled.
    """
    begun = time.monotonic()
    while True:
        try:
            return next(iterator, END)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
        if time.monotonic() - begun > patience:
            raise TrainingFailed(
                f"no images came from the data workers for {patience:g} s (launcher.timeout). The usual cause is a "
                "network file system that does not answer, or code of an image set that waits for something: start the "
                "same command again to go on, with a larger launcher.timeout if nothing was wrong but the time"
            )


def start_worker(parent: int, number: int) -> None:
    """Make a data worker leave signals to the process it works for, and end with it.

    Schedulers and terminals signal the whole process group: a worker that dies of it would turn a stop in good order
    into a failure. One that outlived its run would hold the lock of the run directory, which it inherits by fork.
    Python's newer start methods put a server between the run and its workers, which nothing would end with the run.
    """
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    kill_with_parent(parent)


def end_workers(iterator: Any, workers: list[BaseProcess]) -> None:
    """End data workers whatever they are at, a read that never ends included.

    torch asks them to end, waits, and sends SIGTERM, which they ignore; so those that do not answer are killed.
    """
    killer = threading.Timer(GRACE, kill, [workers])
    killer.daemon = True
    killer.start()
    with unwatched():
        iterator._shutdown_workers()
        killer.cancel()
        kill(workers)
        for worker in workers:
            worker.join(LOOK)
    ALIVE.difference_update(workers)


def kill(workers: Iterable[BaseProcess]) -> None:
    """Kill those of the processes that are alive."""
    for worker in list(workers):
        with suppress(ValueError, OSError):  # it is closed, or ended just now
            worker.kill()


@contextmanager
def unwatched() -> Iterator[None]:
    """Within the block torch does not raise for a worker that ends: it would do so in the midst of anything."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def worker_died(error: BaseException) -> ProcessLost:
    """The message for a data worker that vanished."""
    return ProcessLost(
        f"a data worker died ({str(error).splitlines()[0]}). The usual cause is too little memory: "
        "lower dataset.workers (0 reads in the main process) and start the same command again to go on"
    )
