"""Data workers, the processes that read images: start, ordered requests, error reporting and shutdown."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import tempfile
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

from sslcli.data import worker_server
from sslcli.data.batch_slots import BatchSlots, LargeBatch, PackedBatch, pack
from sslcli.data.num_workers import BatchMemory, prefetch_factor
from sslcli.data.worker_server import ServerContext
from sslcli.errors import BUG, ConfigError, ProcessLost, TrainingFailed, class_name, summary, user_code_error
from sslcli.system.child_processes import kill_with_parent

DEFAULT_TIMEOUT = 600.0  # seconds to wait for a batch
POLL_INTERVAL = 1.0  # seconds between checks of the workers while waiting
GRACE_PERIOD = 1.0  # seconds to wait for workers to end by themselves, before they are killed
MAX_SOCKET_FOLDER = 70  # bytes; multiprocessing adds about 31 for the name of a socket, and Linux allows 107
SHARED_MEMORY = "/dev/shm"
SHORT_FOLDERS = ("/tmp", "/var/tmp", SHARED_MEMORY)
END = object()  # what next_item returns after the last item
LIVE_WORKERS: set[BaseProcess] = set()
# At exit, Python waits for its child processes. A worker that hangs in a read would block the exit forever.
atexit.register(lambda: kill_processes(LIVE_WORKERS))


class ErrorReturningDataset(Dataset[Any]):
    """Dataset that returns an exception as a value instead of raising it, and returns batches in slots.

    If a worker raised an exception, torch would raise another exception in the main process, with the traceback as text
    in its message. A returned exception reaches the main process unchanged.

    An index is a tuple of a slot and a request. If the slot is None, the batch is returned as it is.

    Args:
        dataset: the dataset to read.
        owner: the subclass of `Source` (dataset of sslcli) that reads the images. If this class is not part of sslcli,
            its exceptions are reported as errors in user code.
        slots: memory for batches; None = no slots.
    """

    def __init__(self, dataset: Dataset[Any], owner: type, slots: BatchSlots | None = None) -> None:
        self.dataset, self.owner, self.slots = dataset, owner, slots

    def __getitem__(self, index: tuple[int | None, Any]) -> Any:
        slot, request = index
        try:
            batch = self.dataset[request]
            return batch if self.slots is None or slot is None else pack(batch, self.slots, slot)
        except (ConfigError, TrainingFailed) as error:
            return error
        except MemoryError:
            return TrainingFailed(
                "there is not enough memory to read the images: lower dataset.workers or train.batch_size, then start "
                "the same command again to resume"
            )
        except Exception as error:
            return self.failure(error)

    def failure(self, error: Exception) -> ConfigError | TrainingFailed:
        """Return the error that ends the command: UserCodeError if `error` comes from user code, else TrainingFailed.

        The message contains the traceback of `error`.
        """
        found = user_code_error("reading images", error, owner=self.owner)
        if found is not None:
            return found
        lines = traceback.format_exception(error)
        text = f"{class_name(self.owner)} failed while reading images ({summary(error)})\n{''.join(lines)}"
        return TrainingFailed(f"{text.rstrip()}\n{'' if isinstance(error, OSError) else BUG}".rstrip())


def choose_socket_folder() -> None:
    """Choose a folder for the sockets of multiprocessing, if the path of the folder for temporary files is too long.

    Workers and this process exchange file descriptors through Unix sockets. The path of a socket has at most 107 bytes
    on Linux. With a longer path, a thread of the worker would fail, and this process would wait forever. Call this
    function before the first worker starts. Raises ConfigError if there is no folder with a short path.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= MAX_SOCKET_FOLDER:
        return
    folder = next((each for each in SHORT_FOLDERS if os.access(each, os.W_OK | os.X_OK)), None)
    if folder is None:
        raise ConfigError(
            f"the folder for temporary files is {tempfile.gettempdir()}, but sockets of data workers need a path of at "
            f"most {MAX_SOCKET_FOLDER} bytes, and none of {', '.join(SHORT_FOLDERS)} can be written: set the "
            "environment variable TMPDIR to a shorter path, or read in the main process (dataset.workers=0; ssl-eval: "
            "workers=0)"
        )
    before, tempfile.tempdir = tempfile.gettempdir(), folder
    try:
        multiprocessing.util.get_temp_dir()  # creates the folder for sockets of this process and of its workers
    finally:
        tempfile.tempdir = before


class RequestSampler:
    """Sampler that yields a slot and a request for each element of `requests`. The sampler can be used only once.

    A request is an index with which a dataset returns one batch. The index for the dataset `ViewCrops` is a `Request`,
    which lists the images of the batch. The slot is None if there are no slots or if no slot is free.
    """

    def __init__(self, requests: Iterable[Any], slots: BatchSlots | None) -> None:
        self.requests, self.slots = requests, slots

    def __iter__(self) -> Iterator[tuple[int | None, Any]]:
        return ((None if self.slots is None else self.slots.take(), request) for request in self.requests)


def iterate_batches(
    dataset: Dataset[Any],
    requests: Iterable[Any],
    workers: int,
    *,
    owner: type,
    timeout: float = DEFAULT_TIMEOUT,
    memory: BatchMemory | None = None,
    pin_memory: bool = False,
) -> Generator[Any, None, None]:
    """Yield `dataset[request]`, a batch, for each request, in order. Worker processes read the batches.

    The workers end when the generator is exhausted, is closed, or raises an exception.

    Args:
        dataset: the dataset to read.
        requests: the requests.
        workers: number of worker processes; 0 = read in this process.
        owner: the class that reads the images, see `ErrorReturningDataset`.
        timeout: seconds to wait for a batch.
        memory: the size of the batches. If it is given, workers write batches to slots, see `batch_slots`.
        pin_memory: whether to copy batches to pinned memory, from which copies to a GPU are asynchronous.

    Raises:
        ConfigError: the data is invalid, or user code raised an error.
        ProcessLost: a worker died.
        TrainingFailed: no batch arrived within `timeout` seconds, or the workers cannot be started or lack memory.
    """
    if workers:
        choose_socket_folder()
    forks = workers > 0 and sys.platform == "linux"  # see init_worker
    server = worker_server.current() if forks else None
    slots, files = None, list[int]()
    if forks and memory is not None:
        slots, files = create_slots(memory, workers, in_file=server is not None)
    whole = ErrorReturningDataset(dataset, owner, slots)
    stored = None if server is None else server.store(whole, files)
    for file in files:
        os.close(file)
    loader = DataLoader(
        whole if stored is None else stored,
        batch_size=None,
        sampler=RequestSampler(requests, slots),
        num_workers=workers,
        prefetch_factor=prefetch_factor(workers) if workers else None,
        pin_memory=pin_memory,
        timeout=POLL_INTERVAL if workers else 0,
        worker_init_fn=partial(init_worker, os.getpid() if stored is None or server is None else server.pid),
        multiprocessing_context=ServerContext() if stored is not None else "fork" if forks else None,
        # By default, each start of workers draws a number from the global generator. A resumed run starts workers more
        # often, so its other random numbers would differ.
        generator=torch.Generator(),
    )
    try:
        with loader_iterator(loader, workers) as iterator:
            while (item := next_item(iterator, timeout)) is not END:
                if isinstance(item, Exception):
                    raise item
                yield item.unpack() if isinstance(item, (PackedBatch, LargeBatch)) else item
    finally:
        if server is not None and stored is not None:
            server.forget(stored)


def create_slots(memory: BatchMemory, workers: int, *, in_file: bool) -> tuple[BatchSlots, list[int]]:
    """Return the slots for the batches of all workers, and the file that contains them if `in_file` is True.

    Raises TrainingFailed if they do not fit into the memory.
    """
    count, size = memory.num_slots(workers), memory.slot_bytes(workers)
    try:
        if not in_file:
            return BatchSlots(count, size), []
        slots, file = BatchSlots.in_file(count, size)
        return slots, [file]
    except OSError as error:
        raise not_started(workers, error) from error


def not_started(workers: int, error: OSError) -> TrainingFailed:
    """Return the error for data workers that the operating system did not start because of `error`."""
    return TrainingFailed(
        f"{workers} data workers cannot be started ({error.strerror or error}): lower dataset.workers (0 reads in "
        "the main process), or allow this user more processes and memory"
    )


@contextmanager
def loader_iterator(loader: DataLoader[Any], workers: int) -> Iterator[Iterator[Any]]:
    """Yield an iterator over a loader. When the block ends, end the workers. See `iterate_batches` for the errors.

    workers: number of data workers of the loader.
    """
    others = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except OSError as error:
        raise not_started(workers, error) from error
    started = [child for child in multiprocessing.active_children() if child not in others] if workers else []
    LIVE_WORKERS.update(started)
    try:
        yield iterator
    except (RuntimeError, ConnectionError, EOFError) as error:
        if "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError)):
            raise worker_died_error(error, started) from error
        raise
    finally:
        if started:
            end_workers(iterator, started)


def next_item(iterator: Iterator[Any], timeout: float) -> Any:
    """Return the next item of `iterator`, or the constant END after the last item.

    Raises TrainingFailed if no item arrives within `timeout` seconds.

    The function waits in intervals of `POLL_INTERVAL` seconds. Between two intervals, torch checks that all workers are
    alive, and Python handles signals.
    """
    start = time.monotonic()
    while True:
        try:
            return next(iterator, END)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
        if time.monotonic() - start > timeout:
            raise TrainingFailed(
                f"no images arrived from the data workers within {timeout:g} s (launcher.timeout). The usual cause is "
                "a network file system that does not respond, or a custom dataset that blocks: start the same command "
                "again to resume, with a larger launcher.timeout if reading is merely slow"
            )


def init_worker(parent: int, number: int) -> None:
    """Make a data worker ignore signals and end with its parent process. This function runs in the worker.

    parent: process id of the parent process: the run, or its `worker_server`.
    number: number of the worker, which torch passes; it is not used.

    Schedulers and terminals send signals to the whole process group. If a signal killed a worker, a graceful stop would
    become a failure. A worker inherits the lock of the run directory through fork. If the worker outlived its run, it
    would keep this lock. Workers are started by fork, because Python's newer start methods use a server process that
    does not end with the run.
    """
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    kill_with_parent(parent)


def end_workers(iterator: Any, workers: list[BaseProcess]) -> None:
    """End data workers, including workers that hang in a read.

    torch asks the workers to end and waits. Then it sends SIGTERM, but the workers ignore SIGTERM. Workers that still
    run after `GRACE_PERIOD` seconds are therefore killed.
    """
    killer = threading.Timer(GRACE_PERIOD, kill_processes, [workers])
    killer.daemon = True
    killer.start()
    with default_sigchld():
        iterator._shutdown_workers()
        killer.cancel()
        kill_processes(workers)
        for worker in workers:
            worker.join(POLL_INTERVAL)
    LIVE_WORKERS.difference_update(workers)


def kill_processes(processes: Iterable[BaseProcess]) -> None:
    """Kill the processes that are alive."""
    for process in list(processes):
        with suppress(ValueError, OSError):  # the process object is closed, or the process has just ended
            process.kill()


@contextmanager
def default_sigchld() -> Iterator[None]:
    """Disable torch's SIGCHLD handler within the block.

    When a worker ends, torch's handler raises an exception at an arbitrary point of the program.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def worker_died_error(error: BaseException, workers: Iterable[BaseProcess] = ()) -> ProcessLost:
    """Return the error for a data worker that died.

    error: the exception that torch raised because of it.
    workers: the data workers; their exit codes may tell more than the exception.
    """
    first = (str(error) or type(error).__name__).splitlines()[0].partition(". It is possible")[0]
    if "Bus error" in first or any(worker.exitcode == -signal.SIGBUS for worker in workers):
        cause = (
            f"It got a bus error. The usual cause is that {SHARED_MEMORY} is full ({free_shared_memory()}), or that an "
            "image file became shorter while it was read: give a container more shared memory (docker run "
            "--shm-size=8g, or --ipc=host), or"
        )
    else:
        cause = "The usual cause is too little memory:"
    return ProcessLost(
        f"a data worker died ({first}). {cause} lower dataset.workers (0 reads in the main process) and start the same "
        "command again to resume"
    )


def free_shared_memory() -> str:
    """Return how much of the shared memory is free, as text."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return "its size is unknown"
    free, total = (blocks * state.f_frsize / 1e6 for blocks in (state.f_bavail, state.f_blocks))
    return f"{free:,.0f} of {total:,.0f} MB are free"
