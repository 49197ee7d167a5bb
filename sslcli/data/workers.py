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

from sslcli.errors import BUG, ConfigError, ProcessLost, TrainingFailed, class_name, summary, user_code_error
from sslcli.system import cpu
from sslcli.system.child_processes import kill_with_parent
from sslcli.system.launch_variables import local_world_size

MAX_GPU_WORKERS, CPU_WORKERS = 8, 2
SMALL_SIDE, FEW_CORES = 64, 2  # pixels per side, cores per process; see default_workers
PREFETCH_FACTOR = 4  # number of batches that a worker prefetches
DEFAULT_TIMEOUT = 600.0  # seconds to wait for a batch
POLL_INTERVAL = 1.0  # seconds between checks of the workers while waiting
GRACE_PERIOD = 1.0  # seconds to wait for workers to end by themselves, before they are killed
SHARED_MEMORY = "/dev/shm"
MAX_SOCKET_FOLDER = 70  # bytes; multiprocessing adds about 31 for the name of a socket, and Linux allows 107
SHORT_FOLDERS = ("/tmp", "/var/tmp", SHARED_MEMORY)
END = object()  # what next_item returns after the last item
LIVE_WORKERS: set[BaseProcess] = set()
# At exit, Python waits for its child processes. A worker that hangs in a read would block the exit forever.
atexit.register(lambda: kill_processes(LIVE_WORKERS))


def default_workers(image_size: int) -> int:
    """Return the number of data workers to use if `dataset.workers` is null.

    - With a GPU, the number is the number of cores of this process minus one, at least 1 and at most 8.
    - Without a GPU, if images have at most 64 pixels per side and the process has at most 2 cores, the number is 0.
    - In all other cases without a GPU, the number is 2, because training also needs the cores.

    docs/performance.md has the measurements.
    """
    if torch.cuda.is_available():
        return min(MAX_GPU_WORKERS, max(1, cpu.cores_per_process() - 1))
    return 0 if image_size <= SMALL_SIDE and cpu.cores_per_process() <= FEW_CORES else CPU_WORKERS


class ErrorReturningDataset(Dataset[Any]):
    """Dataset that returns an exception as a value instead of raising it.

    If a worker raised an exception, torch would raise another exception in the main process, with the traceback as text
    in its message. A returned exception reaches the main process unchanged.

    Args:
        dataset: the dataset to read.
        owner: the subclass of `Source` (dataset of sslcli) that reads the images. If this class is not part of sslcli,
            its exceptions are reported as errors in user code.
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


def check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Raise ConfigError if the shared memory is too small for the prefetched batches of all workers.

    workers: number of data workers of each process.
    batch_bytes: bytes of one batch. A worker prefetches `PREFETCH_FACTOR` batches.

    On Linux, batches are passed through /dev/shm, which has only 64 MB in a container by default. Without this check,
    the workers would crash or hang.
    """
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:  # another operating system
        return
    needed, free = batch_bytes * PREFETCH_FACTOR * workers * local_world_size(), state.f_bavail * state.f_frsize
    if needed > free:
        raise ConfigError(
            f"dataset.workers is {workers}, which needs about {needed / 1e6:,.0f} MB of shared memory, but "
            f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB: give the container more (docker run "
            f"--shm-size={needed / 1e9 + 1:.0f}g, or --ipc=host), read in the main process (dataset.workers=0; "
            "ssl-eval: workers=0), or lower the batch size"
        )


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
    """Sampler that yields the elements of the iterator `requests`. The sampler can be used only once.

    A request is an index with which a dataset returns one batch. The index for the dataset `ViewCrops` is a `Request`,
    which lists the images of the batch.
    """

    def __init__(self, requests: Iterator[Any]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Any]:
        return self.requests


def iterate_batches(
    dataset: Dataset[Any], sampler: Iterable[Any], workers: int, *, owner: type, timeout: float = DEFAULT_TIMEOUT
) -> Generator[Any, None, None]:
    """Yield `dataset[request]`, a batch, for each request of `sampler`, in order. Worker processes read the batches.

    The workers end when the generator is exhausted, is closed, or raises an exception.

    Args:
        dataset: the dataset to read.
        sampler: yields the requests.
        workers: number of worker processes; 0 = read in this process.
        owner: the class that reads the images, see `ErrorReturningDataset`.
        timeout: seconds to wait for a batch.

    Raises:
        ConfigError: the data is invalid, or user code raised an error.
        ProcessLost: a worker died.
        TrainingFailed: no batch arrived within `timeout` seconds, or the workers cannot be started or lack memory.
    """
    if workers:
        choose_socket_folder()
    loader = DataLoader(
        ErrorReturningDataset(dataset, owner),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=PREFETCH_FACTOR if workers else None,
        pin_memory=torch.cuda.is_available(),
        timeout=POLL_INTERVAL if workers else 0,
        worker_init_fn=partial(init_worker, os.getpid()),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # see init_worker
        # By default, each start of workers draws a number from the global generator. A resumed run starts workers more
        # often, so its other random numbers would differ.
        generator=torch.Generator(),
    )
    with loader_iterator(loader, workers) as iterator:
        while (item := next_item(iterator, timeout)) is not END:
            if isinstance(item, Exception):
                raise item
            yield item


@contextmanager
def loader_iterator(loader: DataLoader[Any], workers: int) -> Iterator[Iterator[Any]]:
    """Yield an iterator over a loader. When the block ends, end the workers. See `iterate_batches` for the errors.

    workers: number of data workers of the loader.
    """
    others = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except OSError as error:
        raise TrainingFailed(
            f"{workers} data workers cannot be started ({error.strerror or error}): lower dataset.workers (0 reads in "
            "the main process), or allow this user more processes and memory"
        ) from error
    started = [child for child in multiprocessing.active_children() if child not in others] if workers else []
    LIVE_WORKERS.update(started)
    try:
        yield iterator
    except (RuntimeError, ConnectionError, EOFError) as error:
        if "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError)):
            raise worker_died_error(error) from error
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

    parent: process id of the parent process.
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


def worker_died_error(error: BaseException) -> ProcessLost:
    """Return the error for a data worker that died. `error` is the exception that torch raised because of it."""
    return ProcessLost(
        f"a data worker died ({str(error).splitlines()[0]}). The usual cause is too little memory: "
        "lower dataset.workers (0 reads in the main process) and start the same command again to resume"
    )
