"""How far each process of a run is, told to the others, so that one that hangs is named and the run ends.

A process that does not come to an operation of all keeps the others waiting inside it, where they can neither look
around nor stop. So each process counts what it does, and a thread of its own tells the counts to a store that all see.
When no process has done anything for the time limit, the threads read who is behind, tell it, and end the processes.
"""

from __future__ import annotations

import json
import os
import platform
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from sslcli.errors import TrainingFailed

SLOWEST = 10.0  # seconds between two looks at the most
LOOKS = 20  # looks within the time limit
SLACK = 5.0  # seconds after the time limit, for a wait that ends by itself
IMAGES = "the images"  # how the place of a process that waits for images begins
SILENCE = 3  # looks without a beat after which a process counts as stopped


@dataclass
class Progress:
    """What a process tells of itself."""

    meetings: int = 0  # operations of all processes that it arrived at
    signs: int = 0  # everything it did
    place: str = "the start"
    beats: int = 0  # messages of its thread, which goes on while the process waits
    host: str = ""
    pid: int = 0


_mine = Progress()


def sign(place: str = "") -> None:
    """This process goes on, and is now at `place`, if that is given."""
    _mine.signs += 1
    _mine.place = place or _mine.place


def meet() -> None:
    """This process arrives at an operation that all processes take part in."""
    _mine.meetings += 1
    _mine.signs += 1


def join(limit: float) -> Store:
    """Wait until all processes of the run are there; a store that all of them see.

    Raises TrainingFailed, naming those that are missing, after `limit` seconds.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the agent does
    try:
        store: Store = TCPStore(
            host,
            port,
            is_master=serves,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,  # which would not tell who is missing
            multi_tenant=True,  # torch serves its own store there
        )
    except RuntimeError as error:
        raise TrainingFailed(
            f"process 0 did not answer at {host}:{port} within {limit:g} s (launcher.timeout): look at what it prints, "
            "and whether this machine reaches that one"
        ) from error
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"heartbeat/{start}", store)
    _mine.host, _mine.pid = platform.node(), os.getpid()
    store.set(str(rank), json.dumps(asdict(_mine)))
    try:
        store.wait([str(other) for other in range(size)], timedelta(seconds=limit))
    except RuntimeError as error:
        missing = ", ".join(str(other) for other in range(size) if not store.check([str(other)]))
        raise TrainingFailed(
            f"of {size} processes, these have not come within {limit:g} s (launcher.timeout): {missing}. Look at what "
            "they print and at their machines"
        ) from error
    return store


@contextmanager
def watched(store: Store, *, rank: int, size: int, limit: float, end: Callable[[str], None]) -> Iterator[None]:
    """Within the block, call `end(message)` from a thread once no process of the run went on for `limit` seconds.

    `message` is empty on processes that need not tell, since another does.
    """
    if size == 1:  # keeps nobody waiting
        with watched_alone(limit=limit, end=end):
            yield
        return
    closing = threading.Event()
    thread = threading.Thread(target=look, args=(store, rank, size, limit, end, closing), daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


@contextmanager
def watched_alone(*, limit: float, end: Callable[[str], None]) -> Iterator[None]:
    """Within the block, call `end(message)` from a thread once a run of one process waits too long for images.

    That is for images that the process reads itself, `SLACK` seconds after `limit`: with data workers the wait ends by
    itself, in better order. Nothing else that a process does has an end that could be told.
    """
    closing = threading.Event()
    thread = threading.Thread(target=look_alone, args=(limit, end, closing), daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


def look_alone(limit: float, end: Callable[[str], None], closing: threading.Event) -> None:
    """Count how long this process has been waiting for the same images."""
    interval = min(limit / LOOKS, SLOWEST)
    still, before = 0.0, _mine.signs
    while not closing.wait(interval):
        waits = _mine.signs == before and _mine.place.startswith(IMAGES)
        still, before = still + interval if waits else 0.0, _mine.signs
        if still >= limit + SLACK and not closing.is_set():
            end(
                f"{_mine.place} did not come within {limit:g} s (launcher.timeout). The usual cause is a network file "
                "system that does not answer, or code of an image set that waits for something; the steps since the "
                "last checkpoint are lost. Start the same command again to go on, with a larger launcher.timeout if "
                "nothing was wrong but the time"
            )
            return


def look(
    store: Store, rank: int, size: int, limit: float, end: Callable[[str], None], closing: threading.Event
) -> None:
    """Tell how far this process is and, while it does not go on, read how far the others are.

    Waiting is counted in looks and not by a clock, so that time in which this process itself was stopped, together
    with its machine perhaps, is not held against the others.
    """
    interval = min(limit / LOOKS, SLOWEST)
    still, beats, before = 0.0, 0, _mine.signs
    known: dict[int, Progress] = {}
    silent: Counter[int] = Counter()  # looks since the last beat
    while not closing.wait(interval):
        beats += 1
        mine = replace(_mine, beats=beats)
        tell(store, rank, mine)
        if mine.signs != before:
            still, before = 0.0, mine.signs
            silent.clear()
            continue
        found = read(store, size)
        moved = any(progress.signs != known[r].signs for r, progress in found.items() if r in known)
        for r in range(size):
            silent[r] = 0 if r in found and found[r] != known.get(r) else silent[r] + 1
        known = found or known
        still = 0.0 if moved else still + interval
        if still >= limit and not closing.is_set():
            end(verdict(rank, found, {r for r in silent if silent[r] >= SILENCE}, limit))
            return


def tell(store: Store, rank: int, mine: Progress) -> None:
    """Let the others know how far this process is."""
    with suppress(RuntimeError):  # where the store does not answer, reading finds out
        store.set(str(rank), json.dumps(asdict(mine)))


def read(store: Store, size: int) -> dict[int, Progress]:
    """How far all processes are, {} where the store does not answer."""
    try:
        answers = store.multi_get([str(rank) for rank in range(size)])
    except RuntimeError:
        return {}
    return {rank: Progress(**json.loads(answer)) for rank, answer in enumerate(answers)}


def verdict(rank: int, found: dict[int, Progress], silent: set[int], limit: float) -> str:
    """Who keeps the others waiting, in words; empty where another process is to tell it."""
    remedy = (
        "the steps since the last checkpoint are lost. Start the same command again to go on, with a larger "
        "launcher.timeout if nothing was wrong but the time"
    )
    if not found:
        return f"no process went on for {limit:g} s, and the meeting place of the processes does not answer; {remedy}"
    arrived = max(progress.meetings for progress in found.values())
    to_blame = sorted(silent or {r for r, progress in found.items() if progress.meetings < arrived})
    if rank != min(set(found) - set(to_blame), default=rank):
        return ""
    if not to_blame:
        places = ", ".join(sorted({progress.place for progress in found.values()}))
        return (
            f"no process went on for {limit:g} s (launcher.timeout), and none is behind the others (at {places}): they "
            f"do not reach each other over the network, or a device hangs; {remedy}"
        )
    told = ", ".join(
        f"process {r} (id {found[r].pid} on {found[r].host}, at {found[r].place}"
        + (", it does not answer: stopped, or its machine is gone)" if r in silent else ")")
        for r in to_blame
    )
    return f"the others waited {limit:g} s (launcher.timeout) in vain for {told}; {remedy}"
