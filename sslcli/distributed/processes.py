"""Rank, process group and start time of this process, for all launchers.

A launcher is torchrun, Slurm, or our own agent, which starts and restarts the processes of ssl-train. The environment
variables of launchers are read in `sslcli.system.launch_variables`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from sslcli.distributed import watchdog
from sslcli.errors import EXIT_FAILED, print_error
from sslcli.system import child_processes
from sslcli.system.launch_variables import AGENT, START_TIME, earlier_starts, is_first_to_report, launched

EXIT_LOST = 4  # with this exit code, a process asks our agent for a restart; the user sees EXIT_FAILED


def is_launched() -> bool:
    """Return True if a launcher started this process as a rank of a process group.

    A launcher is torchrun, Slurm, or our own agent, which starts the processes of ssl-train.
    """
    return launched() is not None


def number() -> int:
    """Return the rank of this process; 0 is the main process. This works before the process group is initialized."""
    member = launched()
    return 0 if member is None else member.rank


def lost_contact(error: Exception) -> bool:
    """Return True if torch raised `error` because another process of the run has ended.

    If a process ends, the remaining processes cannot complete their collectives, and torch raises an error.
    """
    return is_launched() and (
        isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed" in str(error)
    )


@contextmanager
def process_group(
    device: torch.device, *, limit: float, end: Callable[[str], None], timeout: float | None = None
) -> Iterator[None]:
    """Initialize the process group for the duration of the `with` block, if the run has several processes.

    A watchdog thread of each process calls `end(message)` after `limit` seconds without progress, see the module
    `watchdog`. `device` is the device of this process. `timeout` is the maximum wait of a collective in seconds. None =
    ten times `limit`, and at least an hour.
    """
    member = launched()
    if member is None:
        with watchdog.watched_alone(limit=limit, end=end):
            yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        child_processes.kill_with_parent(os.getppid())  # the parent is our agent or the agent of torchrun
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = watchdog.join(member, limit)
    leave = partial(os._exit, exit_lost())
    with watchdog.watched(store, rank=member.rank, size=member.world_size, limit=limit, end=end, leave=leave):
        watchdog.record_collective()
        # Normally the watchdog ends a run that hangs. This longer timeout is a fallback.
        patience = timedelta(seconds=timeout or max(10 * limit, 3600))
        # Without `device_id`, NCCL would derive the GPU of collectives such as `barrier` from the rank.
        dist.init_process_group(backend, timeout=patience, device_id=device if device.type == "cuda" else None)
        try:
            yield
        except BaseException:
            if device.type != "cuda":  # with NCCL, this call would wait for the other processes and delay the error
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def die_with_parent() -> None:
    """End this process as soon as its parent has ended, even if SIGKILL ended the parent.

    The parent is our agent, the process of ssl-train that starts and restarts the training processes.
    """
    child_processes.kill_with_parent(int(os.environ[AGENT]))


def restarted() -> bool:
    """Return True if the processes of this run have been restarted.

    Processes are restarted by the agent (the process of ssl-train that starts the training processes), by torchrun, or
    by the Slurm job script.
    """
    return earlier_starts() > 0


def start_time() -> float:
    """Return the start time of the command `ssl-train` on the clock `time.monotonic`.

    Our agent starts and restarts the processes of ssl-train. A restart does not change the start time.
    """
    return float(os.environ.get(START_TIME, time.monotonic()))


def exit_lost() -> int:
    """Return the exit code for a process that lost contact with another process of the run.

    The agent is the process of ssl-train that starts the training processes. If an agent started this process, the code
    is EXIT_LOST, and the agent may restart all processes. Otherwise, for example under torchrun, the code is
    EXIT_FAILED.
    """
    return EXIT_LOST if AGENT in os.environ else EXIT_FAILED


def end_process(command: str, message: BaseException | str, code: int, *, wait: float) -> int:
    """Print why this process ends, and return the exit code.

    Usually all processes end for the same reason. To print this reason only once, rank 0 prints immediately, and the
    other ranks first wait. After rank 0 has ended, the launcher ends the others while they wait. On a slow machine, it
    may end them too late. Therefore, of the processes that one elastic agent started on this node, only the first one
    prints a message.

    Args:
        command: train or eval.
        message: the reason.
        code: the exit code.
        wait: seconds to wait before the message is printed; 0 = print immediately.
    """
    time.sleep(wait)
    if is_first_to_report(str(message)):
        print_error(command, message)
    return code
