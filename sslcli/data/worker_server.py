"""Process that starts data workers for this one after CUDA was initialized.

A process that is forked after CUDA or NCCL was initialized inherits their memory and locks, but not their threads. Data
workers that start then, such as those of a k-NN evaluation, are therefore forked from a server. The server is itself
forked from this process, before CUDA is initialized. It gets each dataset once, so that its workers share the memory of
the dataset as they share that of this process otherwise.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import context, forkserver, popen_forkserver, reduction, util
from typing import Any, NoReturn

import torch
from torch.utils.data import Dataset

from sslcli.system.child_processes import kill_with_parent

HEADER = struct.Struct("!cQQ")  # kind of the request, number of the dataset, length of the content
ANSWER = struct.Struct("!q")  # process ID of a worker; 0 = done; -1 = the dataset cannot be read by another process
START, STORE, FORGET = b"s", b"d", b"f"
MAX_FDS = 250  # of a message; Linux allows 253
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STORED: dict[int, Any] = {}  # in the server and its workers: number -> dataset


class StoredDataset(Dataset[Any]):
    """A dataset that the server has, by its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getitem__(self, index: Any) -> Any:
        return STORED[self.number][index]


class WorkerServer:
    """The server, seen from this process."""

    def __init__(self) -> None:
        self.lock, self.numbers = threading.Lock(), itertools.count()
        self.socket, other = socket.socketpair()
        parent = os.getpid()
        for stream in filter(None, (sys.stdout, sys.stderr)):  # workers would print again what is not written yet
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self.socket.close()
            serve(other, parent)
        other.close()

    def store(self, dataset: Dataset[Any], fds: Sequence[int] = ()) -> StoredDataset | None:
        """Send a dataset to the server.

        Return None if it cannot be sent, such as one with a lambda, or with a cache of decoded images in the memory of
        this process.

        `fds` are file descriptors that the dataset opens again when it is unpickled, see `received`.
        """
        try:
            content = pickle.dumps(dataset)
        except Exception:  # user code may raise anything
            return None
        number = next(self.numbers)
        return StoredDataset(number) if self.request(STORE, number, content, fds) == 0 else None

    def forget(self, dataset: StoredDataset) -> None:
        """Release the memory of a dataset in the server."""
        self.request(FORGET, dataset.number)

    def request(self, kind: bytes, number: int = 0, content: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a request, and return the answer. If the server has ended, the result is -1."""
        with self.lock:
            try:
                socket.send_fds(self.socket, [HEADER.pack(kind, number, len(content))], list(fds))
                self.socket.sendall(content)
                return int(ANSWER.unpack(receive(self.socket, ANSWER.size))[0])
            except (OSError, EOFError):
                return -1
            except BaseException:  # a signal handler raised it: the next request would get the answer to this one
                self.socket.close()
                raise

    def close(self) -> None:
        """End the server. Its workers end too."""
        self.socket.close()
        os.waitpid(self.pid, 0)


_server: WorkerServer | None = None


def start(device: torch.device) -> None:
    """Start the server if this process is going to initialize CUDA. Call this before CUDA is initialized.

    On other devices, and on other systems than Linux, there is no server.
    """
    global _server
    if sys.platform == "linux" and device.type == "cuda" and _server is None and not _is_initialized():
        _server = WorkerServer()


def current() -> WorkerServer | None:
    """Return the server if new workers must be started by it, else None. Without CUDA, this process forks them."""
    return _server if _is_initialized() else None


def _is_initialized() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class ServerPopen(popen_forkserver.Popen):
    """Start of a process by the server instead of by Python's fork server."""

    _fds: list[int]  # files that the process inherits

    def _launch(self, process: Any) -> None:
        assert _server is not None
        buffer = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(process, buffer)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, status = os.pipe()
        try:
            self.pid = _server.request(START, 0, buffer.getvalue(), [status, *self._fds])
        finally:
            os.close(status)
        if self.pid < 0:
            raise OSError("the process that starts data workers has ended")


class ServerProcess(context.SpawnProcess):
    """A process that the server starts."""

    @staticmethod
    def _Popen(process: Any) -> Any:
        return ServerPopen(process)

    @staticmethod
    def _after_fork() -> None:
        """Forget the sockets of the parent process, as a forked process does. A spawned process inherits none."""
        util._finalizer_registry.clear()  # type: ignore[attr-defined]
        util._run_after_forkers()  # type: ignore[attr-defined]


class ServerContext(context.SpawnContext):
    """Context of multiprocessing whose processes are started by the server."""

    Process = ServerProcess


def received(index: int) -> int:
    """Return the file descriptor number `index` of the message that this process unpickles."""
    return (forkserver.get_inherited_fds() or [])[index]


def serve(connection: socket.socket, parent: int) -> NoReturn:
    """Answer requests until the process `parent` closes the connection or ends. Runs in the server."""
    try:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        kill_with_parent(parent)
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        workers: dict[int, int] = {}  # process ID -> pipe for the exit code
        while True:
            ready, _, _ = select.select([connection.fileno(), woken], [], [])
            if woken in ready:
                os.read(woken, 4096)
                report_ended(workers)
            if connection.fileno() in ready:
                answer(connection, workers)
    finally:  # no exit handlers: they belong to the parent process
        os._exit(0)


def report_ended(workers: dict[int, int]) -> None:
    """Send the exit codes of workers that have ended to the parent process."""
    for pid, status in list(workers.items()):
        found, code = os.waitpid(pid, os.WNOHANG)
        if found == 0:
            continue
        del workers[pid]
        with suppress(BrokenPipeError):  # nobody waits for the worker anymore
            forkserver.write_signed(status, os.waitstatus_to_exitcode(code))
        os.close(status)


def answer(connection: socket.socket, workers: dict[int, int]) -> None:
    """Receive one request, and send the answer. Raises EOFError if the connection was closed."""
    header, fds, _, _ = socket.recv_fds(connection, HEADER.size, MAX_FDS)
    if not header:
        raise EOFError
    kind, number, length = HEADER.unpack(header + receive(connection, HEADER.size - len(header)))
    content, result = receive(connection, length), 0
    if kind == START:
        result = start_worker(connection, content, fds)
        workers[result] = fds[0]
        fds = fds[1:]
    elif kind == STORE:
        set_received(fds)
        try:
            STORED[number] = pickle.loads(content)
        except Exception:  # user code may raise anything
            result = -1
    else:
        STORED.pop(number, None)
    for fd in fds:
        os.close(fd)
    connection.sendall(ANSWER.pack(result))


def start_worker(connection: socket.socket, content: bytes, fds: list[int]) -> int:
    """Fork a worker that runs a pickled process object, and return its process ID."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.close()
        set_received(fds[1:])
        code = pickle.loads(content)._bootstrap()
    finally:
        os._exit(code)


def set_received(fds: list[int]) -> None:
    """Set the file descriptors that `received` and multiprocessing return while a message is unpickled."""
    forkserver._forkserver._inherited_fds = fds  # type: ignore[attr-defined]


def receive(connection: socket.socket, count: int) -> bytes:
    """Receive exactly `count` bytes. Raises EOFError if the connection was closed."""
    found = bytearray()
    while len(found) < count:
        part = connection.recv(min(count - len(found), 1 << 20))
        if not part:
            raise EOFError
        found += part
    return bytes(found)
