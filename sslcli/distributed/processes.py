"""Rank, process group and start time of a process of a run, for any launcher.

Only RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* are read, which every launcher sets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from sslcli.distributed import watchdog
from sslcli.errors import EXIT_FAILED
from sslcli.system import child_processes

# Environment variables that our agent sets for its processes.
AGENT = "SSLCLI_AGENT"  # its process id
START_TIME = "SSLCLI_BEGUN"  # its start time, by time.monotonic
RESTARTS = "SSLCLI_RESTARTS"  # number of earlier starts
EXIT_LOST = 4  # exit code of a process to our agent: worth a restart. The user sees EXIT_FAILED


def is_launched() -> bool:
    """Return True if a launcher (torchrun, our own agent, Slurm) started this process as a rank of a process group."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def number() -> int:
    """Return the rank of this process, also before the process group is initialized; 0 is the main process."""
    return int(os.environ["RANK"]) if is_launched() else 0


def lost_contact(error: RuntimeError) -> bool:
    """Return True if torch raises this error when another process of the run has ended."""
    return is_launched() and (
        isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed" in str(error)
    )


@contextmanager
def process_group(device: torch.device, *, limit: float, end: Callable[[str], None]) -> Iterator[None]:
    """Initialize the process group for the duration of the block, if the run has several processes.

    `end(message)` is called on each process, from a thread, after `limit` seconds without progress; see `watchdog`.
    """
    if not is_launched():
        with watchdog.watched_alone(limit=limit, end=end):
            yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        child_processes.kill_with_parent(os.getppid())  # the agent, ours or torchrun's
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = watchdog.join(limit)
    with watchdog.watched(store, rank=number(), size=int(os.environ["WORLD_SIZE"]), limit=limit, end=end):
        watchdog.record_collective()
        # The watchdog distinguishes a hang from a long wait; this timeout is a fallback.
        dist.init_process_group(backend, timeout=timedelta(seconds=max(10 * limit, 3600)))
        try:
            yield
        except BaseException:
            if device.type != "cuda":  # NCCL would wait for the others before the error here is reported
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def die_with_parent() -> None:
    """Make this process end when our agent, which started it, ends, even by SIGKILL."""
    child_processes.kill_with_parent(int(os.environ[AGENT]))


def restarted() -> bool:
    """Return True if these processes were restarted, by our agent, by torchrun, or by the Slurm job script."""
    return int(os.environ.get(RESTARTS, 0)) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def start_time() -> float:
    """Return the start time of the command by `time.monotonic`; with our agent, that of the first start."""
    return float(os.environ.get(START_TIME, time.monotonic()))


def exit_lost() -> int:
    """Return the exit code of a process that lost another: EXIT_LOST under our agent, which may then restart all."""
    return EXIT_LOST if AGENT in os.environ else EXIT_FAILED
