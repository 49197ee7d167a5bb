"""Division of work among the processes of a run: parts of a list, independent jobs, work of rank 0, shared errors.

If a function of this module raises an error, it raises on all processes. Therefore no process waits in a collective for
a process that has failed, and all processes may continue together, for example without the GPU or with the next run.

W is the number of processes. With a single process, all functions only call what they are given.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sslcli.distributed import collectives, watchdog
from sslcli.errors import (
    BUG,
    ConfigError,
    NotFinite,
    ProcessLost,
    TrainingFailed,
    UserCodeError,
    is_out_of_memory,
    summary,
    user_code_error,
)

T = TypeVar("T")
_AGREED = "is_agreed"  # attribute of errors that were raised on all processes
SENT = (UserCodeError, ConfigError, ProcessLost, TrainingFailed, NotFinite, ValueError)  # subclasses first


def parts(count: int, *, chunk: int = 1) -> list[range]:
    """Return W contiguous ranges that together are range(`count`), one per rank.

    All ranges but the last nonempty one have a multiple of `chunk` elements. The numbers of chunks differ by at most 1.
    """
    size, chunks = collectives.world_size(), -(-count // chunk)
    bounds = [min(count, chunk * (chunks * rank // size)) for rank in range(size + 1)]
    return [range(bounds[rank], bounds[rank + 1]) for rank in range(size)]


def agreed(compute: Callable[[], T]) -> T:
    """Return `compute()` of this process. If it raises on any process, raise on all processes.

    A process on which `compute` raises an exception raises this exception. Every other process raises a copy of the
    first exception, in rank order. `compute` must not contain collectives.
    """
    if collectives.world_size() == 1:
        return compute()
    own: Exception | None = None
    try:
        result = compute()
    except Exception as error:
        own = error
    failures = collectives.gather_objects(None if own is None else _copy(own))
    first = own or next((failure for failure in failures if failure is not None), None)
    if first is not None:
        first.__dict__[_AGREED] = True
        raise first
    return result


def is_agreed(error: BaseException | None) -> bool:
    """Return True if `error`, or an error that it was raised from, was raised on all processes.

    After any other error, the processes must not continue together: the others may wait in a collective. With a single
    process, the result is always True.
    """
    if collectives.world_size() == 1:
        return True
    return error is not None and (_AGREED in error.__dict__ or is_agreed(error.__cause__))


def _copy(error: Exception) -> Exception:
    """Return a picklable copy of an error to send to other processes, with the message for users."""
    if is_out_of_memory(error):
        return MemoryError(str(error))
    for kind in SENT:
        if isinstance(error, kind):
            return kind(str(error))
    code = user_code_error("evaluating", error)
    if code is not None:
        return code
    lines = "".join(traceback.format_exception(error)).rstrip()
    return TrainingFailed(f"process {collectives.rank()} failed ({summary(error)})\n{lines}\n{BUG}")


def spread(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Call each of `jobs` on one process, and return all results, in the order of the jobs, on all processes.

    Job number n runs on rank n % W, so the first job always runs on rank 0. Within a job, the process acts like a run
    with one process. The results must be picklable, and small, since they are sent to all processes. If a job raises,
    all processes raise, see `agreed`.
    """
    if collectives.world_size() == 1:
        return [job() for job in jobs]
    mine = jobs[collectives.rank() :: collectives.world_size()]

    def results() -> list[T]:
        with collectives.single_process(), watchdog.busy():
            return [job() for job in mine]

    found = collectives.gather_objects(agreed(results))
    return [found[number % len(found)][number // len(found)] for number in range(len(jobs))]


def own_jobs(count: int) -> int:
    """Return how many of `count` jobs `spread` calls on this process."""
    return len(range(collectives.rank(), count, collectives.world_size()))


@torch.no_grad()
def gather_parts(mine: Tensor, sizes: Sequence[int]) -> Tensor:
    """Gather different numbers of rows from the processes: (sizes[rank], ...) to (sum(sizes), ...), in rank order.

    The dtype and all dimensions but the first must be equal on all processes.
    """
    if collectives.world_size() == 1:
        return mine
    gathered = mine.new_empty(sum(sizes), *mine.shape[1:])
    for rank, rows in enumerate(torch.split(gathered, list(sizes))):
        if rank == collectives.rank():
            rows.copy_(mine)
        if len(rows):
            watchdog.record_collective()
            dist.broadcast(rows, src=rank)
    return gathered
