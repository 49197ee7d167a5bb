"""Watchdog that ends a run if a rank stalls, and reports the stalled rank.

If a rank does not join a collective, all other ranks wait in this collective and cannot check for a timeout. Therefore
each rank counts its actions, such as steps and collectives. A watchdog thread of each rank publishes the counts in a
store that all ranks share. If no rank makes progress within the time limit, the watchdog threads report the stalled
ranks and end the processes.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from sslcli.errors import ConfigError, TrainingFailed
from sslcli.system.launch_variables import Member

SLOWEST = 10.0  # maximum seconds between two checks
CHECKS = 20  # minimum number of checks within the time limit
SLACK = 5.0  # seconds added to the time limit, so that the timeout of data workers expires first
IMAGES = "the images"  # prefix of `Progress.place` while a process waits for images
CHECKPOINT = "the checkpoint"  # prefix of `Progress.place` while a process saves a checkpoint
BUSY_INTERVAL = 1.0  # seconds between two reports within `busy`
SILENCE = 3  # after this number of checks without a new heartbeat, a process counts as stopped


@dataclass
class Progress:
    """State of a process. Each process publishes its state in a store that all processes share."""

    collectives: int = 0  # number of collectives that the process has entered
    actions: int = 0  # number of recorded actions, including collectives
    place: str = "the start"  # phrase for what the process does, such as "step 5"
    beats: int = 0  # number of heartbeats of the watchdog thread; they continue while the process waits
    host: str = ""
    pid: int = 0


_own = Progress()


def report_progress(place: str = "") -> None:
    """Record that this process makes progress.

    `place` is a phrase for what the process does now, such as "step 5". If it is empty, the phrase does not change.
    """
    _own.actions += 1
    _own.place = place or _own.place


def record_collective() -> None:
    """Record that this process enters a collective. Calls in code that torch.compile compiles have no effect."""
    if torch.compiler.is_compiling():  # a counter would compile the code again at every call
        return
    _own.collectives += 1
    _own.actions += 1


def join(member: Member, limit: float) -> Store:
    """Wait until all processes of the run have joined, and return the store that they share.

    Args:
        member: rank of this process, number of processes, and address of rank 0.
        limit: maximum wait in seconds.

    Raises TrainingFailed if a process has not joined within this time. The message contains the missing ranks. Raises
    ConfigError if this process is rank 0 and cannot listen on the port.
    """
    rank, size, host, port = member.rank, member.world_size, member.address, member.port
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the elastic agent serves
    try:
        store: Store = TCPStore(
            host,
            port,
            is_master=serves,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,  # the timeout error of TCPStore would not name the missing ranks
            multi_tenant=True,  # torch uses the same port for its own store
        )
    except RuntimeError as error:
        if serves and "failed to listen" in str(error):
            raise ConfigError(cannot_listen(port, str(error))) from error
        raise TrainingFailed(
            f"process 0 did not answer at {host}:{port} within {limit:g} s (launcher.timeout): check its output, and "
            "the network connection from this machine to that one"
        ) from error
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"heartbeat/{start}", store)
    _own.host, _own.pid = platform.node(), os.getpid()
    store.set(str(rank), json.dumps(asdict(_own)))
    try:
        store.wait([str(other) for other in range(size)], timedelta(seconds=limit))
    except RuntimeError as error:
        missing = ", ".join(str(other) for other in range(size) if not store.check([str(other)]))
        raise TrainingFailed(
            f"of {size} processes, these have not joined within {limit:g} s (launcher.timeout): {missing}. Check their "
            "output and their machines"
        ) from error
    return store


def cannot_listen(port: int, error: str) -> str:
    """Return the message for a port that rank 0 cannot open. `error` is the message of torch."""
    reason = "this machine does not allow it"
    if "EADDRINUSE" in error:
        reason = "another process of this machine uses the port"
    elif "EACCES" in error:
        reason = "ports below 1024 need the rights of an administrator"
    return (
        f"the environment variable MASTER_PORT is {port}, but rank 0 cannot listen on this port, because {reason}: set "
        "a free port for all processes of the run, as with torchrun --master-port"
    )


@contextmanager
def watched(
    store: Store, *, rank: int, size: int, limit: float, end: Callable[[str], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Watch all processes within the `with` block. A thread calls `end(message)` if no process makes progress.

    After `limit` seconds without progress of any process, every process calls `end`. One process passes a message that
    names the stalled processes. All other processes pass an empty string. If the run has only one process, see
    `watched_alone`.

    Args:
        store: store that all processes share, from `join`.
        rank: rank of this process.
        size: number of processes.
        limit: time limit in seconds.
        end: function that ends this process. If the message is not empty, it first prints the message.
        leave: function that ends this process after another process has ended, see `watch_ranks`.
    """
    if size == 1:  # there is no other rank to watch
        with watched_alone(limit=limit, end=end):
            yield
        return
    with sigterm_flag() as terminated, in_thread(watch_ranks, store, rank, size, limit, end, terminated, leave):
        yield


@contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True if SIGTERM has arrived within the `with` block.

    Python calls the handler of a signal only when the main thread executes Python code. While this thread is blocked
    in C code, such as a wait for a GPU, only the wakeup file descriptor shows that a signal has arrived.
    """
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    arrived: set[int] = set()

    def terminated() -> bool:
        with suppress(BlockingIOError):
            arrived.update(os.read(reader, 4096))
        return signal.SIGTERM in arrived

    try:
        yield terminated
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


@contextmanager
def watched_alone(*, limit: float, end: Callable[[str], None]) -> Iterator[None]:
    """Call `end(message)` from a thread if a single-process run waits too long for images within the `with` block.

    A wait is too long if it exceeds `limit` + `SLACK` seconds. This happens only if the process reads the images
    itself. If data workers read the images, the timeout of the workers expires first and ends the run with a regular
    error. Other actions of a process are not watched, because their maximum duration is not known.
    """
    with in_thread(watch_image_waits, limit, end):
        yield


@contextmanager
def busy() -> Iterator[None]:
    """Report progress of this process at regular intervals within the `with` block, which may take any time.

    Within the block, the process counts as stalled only if it is stopped or its machine fails.
    """

    def report(closing: threading.Event) -> None:
        while not closing.wait(BUSY_INTERVAL):
            report_progress()

    with in_thread(report):
        yield


@contextmanager
def in_thread(act: Callable[..., None], *arguments: object) -> Iterator[None]:
    """Run `act` in a thread during the `with` block.

    The arguments of `act` are `arguments` and an event. At the end of the `with` block, the event is set and the thread
    is joined, so `act` must return when the event is set.
    """
    closing = threading.Event()
    thread = threading.Thread(target=act, args=(*arguments, closing), daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


def watch_image_waits(limit: float, end: Callable[[str], None], closing: threading.Event) -> None:
    """Call `end(message)` if this process waits for one batch of images for `limit` + `SLACK` seconds.

    The function returns when the event `closing` is set.
    """
    interval = min(limit / CHECKS, SLOWEST)
    still, before = 0.0, _own.actions
    while not closing.wait(interval):
        waits = _own.actions == before and _own.place.startswith(IMAGES)
        still, before = still + interval if waits else 0.0, _own.actions
        if still >= limit + SLACK and not closing.is_set():
            end(
                f"{_own.place} did not arrive within {limit:g} s (launcher.timeout). The usual cause is a network file "
                "system that does not answer, or code of a dataset that blocks; the steps since the last checkpoint "
                "are lost. Run the same command again to resume, with a larger launcher.timeout if the images were "
                "only slow"
            )
            return


def watch_ranks(
    store: Store,
    rank: int,
    size: int,
    limit: float,
    end: Callable[[str], None],
    terminated: Callable[[], bool],
    leave: Callable[[], None],
    closing: threading.Event,
) -> None:
    """Publish the progress of this process in `store`. If it makes no progress, check the other processes for progress.

    If no process makes progress for `limit` seconds, call `end(message)`. The time without progress is computed as the
    number of checks times the interval between checks. It is not measured by a clock, because a clock would also count
    the time in which this process or its machine was suspended. The function returns when the event `closing` is set.
    For the other arguments, see `watched`.

    If a process ends, the agent or torchrun ends the others with SIGTERM. A process that waits on a GPU for a
    collective with the ended process would wait until it is killed. Therefore `leave()` is called if this process has
    received SIGTERM, makes no progress, does not save a checkpoint, and another process no longer publishes.
    """
    interval = min(limit / CHECKS, SLOWEST)
    still, beats, before = 0.0, 0, _own.actions
    known: dict[int, Progress] = {}
    silent: Counter[int] = Counter()  # rank -> number of checks since the last heartbeat of this rank
    while not closing.wait(interval):
        beats += 1
        own = replace(_own, beats=beats)
        publish(store, rank, own)
        if own.actions != before:
            still, before = 0.0, own.actions
            silent.clear()
            continue
        found = read(store, size)
        moved = any(progress.actions != known[r].actions for r, progress in found.items() if r in known)
        for r in range(size):
            silent[r] = 0 if r in found and found[r] != known.get(r) else silent[r] + 1
        known = found or known
        still = 0.0 if moved else still + interval
        others = any(silent[r] >= SILENCE for r in range(size) if r != rank)
        if others and terminated() and not own.place.startswith(CHECKPOINT) and not closing.is_set():
            leave()
            return
        if still >= limit and not closing.is_set():
            end(stall_message(rank, found, {r for r in silent if silent[r] >= SILENCE}, limit))
            return


def publish(store: Store, rank: int, own: Progress) -> None:
    """Publish `own`, the progress of this process, in the store that all processes share."""
    with suppress(RuntimeError):  # `read` detects a store that does not respond
        store.set(str(rank), json.dumps(asdict(own)))


def read(store: Store, size: int) -> dict[int, Progress]:
    """Return the progress of all `size` processes as rank -> progress, or {} if the store does not respond."""
    try:
        answers = store.multi_get([str(rank) for rank in range(size)])
    except RuntimeError:
        return {}
    return {rank: Progress(**json.loads(answer)) for rank, answer in enumerate(answers)}


def stall_message(rank: int, found: dict[int, Progress], silent: set[int], limit: float) -> str:
    """Return the message that names the stalled processes, or "" if another process reports the stall.

    Each process publishes its progress in a store that all processes share.

    Args:
        rank: rank of this process.
        found: rank -> progress of this rank; empty if the store does not respond.
        silent: ranks whose watchdog thread no longer publishes in the store.
        limit: time in seconds without progress after which a stall is reported.
    """
    remedy = (
        "the steps since the last checkpoint are lost. Run the same command again to resume, with a larger "
        "launcher.timeout if the step was only slow"
    )
    if not found:
        return f"no process made progress for {limit:g} s, and the store of process 0 does not answer; {remedy}"
    arrived = max(progress.collectives for progress in found.values())
    stalled_ranks = sorted(silent or {r for r, progress in found.items() if progress.collectives < arrived})
    if rank != min(set(found) - set(stalled_ranks), default=rank):
        return ""
    if not stalled_ranks:
        places = ", ".join(sorted({progress.place for progress in found.values()}))
        return (
            f"no process made progress for {limit:g} s (launcher.timeout), and none is behind the others (at "
            f"{places}): either they cannot reach each other over the network, or a device hangs; {remedy}"
        )
    stalled = ", ".join(
        f"process {r} (id {found[r].pid} on {found[r].host}, at {found[r].place}"
        + (", it does not answer: it is stopped, or its machine has failed)" if r in silent else ")")
        for r in stalled_ranks
    )
    return f"the other processes waited {limit:g} s (launcher.timeout) for {stalled}; {remedy}"
