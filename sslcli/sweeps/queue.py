"""Local job queue: runs the jobs of a sweep in parallel on the devices of this machine.

Each job has its own process, on the devices and CPU cores of a `Slot`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from sslcli.errors import EXIT_STOPPED
from sslcli.report.terminal import print_text
from sslcli.sweeps import reuse, table
from sslcli.sweeps.job import (
    PARENT,
    Job,
    Sweep,
    command_line,
    log_of,
    read_or_create_record,
    record_end,
    record_start,
)
from sslcli.sweeps.slots import Slot
from sslcli.sweeps.status import describe_runner, is_due, is_running
from sslcli.system.locks import lock

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # jobs save and stop on any of these
SENT_AS_SIGTERM = (signal.SIGUSR2, signal.SIGHUP)  # forwarded to the jobs as SIGTERM
POLL_SECONDS = 0.05  # time between two checks of the jobs of this process
BUSY_POLL_SECONDS = 0.5  # time between two checks of a job that another process runs


@dataclass
class Running:
    """A running job of a sweep, and its process."""

    job: Job
    process: subprocess.Popen[bytes]
    slot: int  # index of its slot
    locks: tuple[IO[str], ...]  # locks of the slot and the job; closing a file releases its lock
    is_signaled: bool = False  # True after a signal was sent to the job; a second signal could kill the job


def forwarded_signals() -> list[signal.Signals]:
    """Return the signals that stop a sweep. They are forwarded to its jobs.

    If this process ignores SIGHUP (nohup), its jobs also ignore SIGHUP, and SIGHUP is not in the result.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in FORWARDED if number != signal.SIGHUP or not ignored]


class Relay:
    """Context manager that forwards signals to the running jobs of a sweep. The jobs then save and stop.

    The block must not end before all jobs have ended. At its end, the signal handlers from before the block are
    restored. If a signal was received, its restored handler is called. However, the handler of SIGUSR2 is called only
    if a job has not finished. Calling the handlers has two uses:

    - If this sweep runs inside another sweep, the handler keeps the other sweep from starting further jobs.
    - If a scheduler installed a handler of SIGUSR2, the handler may requeue the scheduler's job.

    Attributes:
        running: jobs to which signals are forwarded.
        received: numbers of the received signals.
        is_stopping: True if no further job may start.
        unfinished: True if a job has not finished.
        previous: signal -> handler from before the block.
    """

    def __init__(self) -> None:
        self.running: list[Running] = []
        self.received: list[int] = []
        self.is_stopping = False
        self.unfinished = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Relay:
        numbers = [*forwarded_signals(), *([signal.SIGUSR2] if callable(signal.getsignal(signal.SIGUSR2)) else [])]
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(self.received) if kind is None else ():
            handler, applies = self.previous[number], number != signal.SIGUSR2 or self.unfinished
            if callable(handler) and handler is not signal.default_int_handler and applies:
                handler(number, None)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Handle the signal `number`: record it, and stop the running jobs."""
        self.received.append(number)
        self.stop_jobs(signal.SIGTERM if number in SENT_AS_SIGTERM else number)

    def stop_jobs(self, number: int) -> None:
        """Send the signal `number` to the running jobs, and prevent the start of further jobs."""
        self.is_stopping = True
        for one in self.running:
            one.is_signaled = True
            one.process.send_signal(number)

    def add(self, one: Running) -> None:
        """Add a job to which signals are forwarded.

        If a signal arrived while the job was starting, send SIGTERM to the job.
        """
        self.running.append(one)
        if self.is_stopping and not one.is_signaled:
            one.process.send_signal(signal.SIGTERM)


class PendingJobs:
    """Jobs of a sweep that this process has not started yet. A job that another process runs is called busy.

    Args:
        sweep: sweep of the jobs.
        jobs: jobs in the order in which they start.
    """

    def __init__(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        self.sweep, self.jobs = sweep, list(jobs)
        self.busy_counts: dict[str, int] = {}  # name of a busy job -> number of checks that found it busy
        self.next_poll = 0.0  # time of the next check of the busy jobs, on the clock time.monotonic

    def is_poll_due(self) -> bool:
        """Return True if the busy jobs (jobs that another process runs) must be checked again now.

        The result is True at most once per `BUSY_POLL_SECONDS`.
        """
        now = time.monotonic()
        is_due = now >= self.next_poll
        if is_due:
            self.next_poll = now + BUSY_POLL_SECONDS
        return is_due

    def poll_busy(self) -> None:
        """Check which jobs are run by other processes. After the check, this process holds no lock of a job.

        If another process runs a job, the second check that detects this prints a message about the job.
        """
        for job in self.jobs if self.is_poll_due() else ():
            if is_running(self.sweep, job.name, read_or_create_record(self.sweep, job)):
                self._count_busy(job)

    def pop_free(self) -> tuple[Job, IO[str]] | None:
        """Remove the first job that this process can start now, and return the job and its open lock file.

        Such a job is due (it must be started or resumed), and no other process runs it. A job that is not due is
        removed and skipped. Return None if there is no job that can start now.
        """
        polls_busy = self.is_poll_due()
        for job in list(self.jobs):
            if job.name in self.busy_counts and not polls_busy:
                continue
            file = reuse.claim(self.sweep, job)
            if file is None:
                self._count_busy(job)
                continue
            self.jobs.remove(job)
            if is_due(self.sweep, job, is_claimed=True):
                return job, file
            file.close()
        return None

    def _count_busy(self, job: Job) -> None:
        """Count how often another process was found to be running `job`. The second time, print a message."""
        self.busy_counts[job.name] = self.busy_counts.get(job.name, 0) + 1
        if self.busy_counts[job.name] == 2:
            print_text(f"waiting     {self.sweep.title(job)}: {describe_runner(self.sweep, job)} is running it")


def run_queue(sweep: Sweep, jobs: list[Job], slots: list[Slot] | None, *, quiet: bool) -> bool:
    """Run the jobs that must be started or resumed, each as soon as a slot is free.

    Return True if the sweep was stopped. A slot is a part of this machine that runs one job at a time.

    - If `slots` is None, all jobs start immediately.
    - If another process runs a job, the queue waits until that process ends. If the job is then unfinished, the queue
      resumes it.
    - A slot is locked by a file in the sweep's folder, so that several processes on this machine can share the slots.
    - If `quiet` is True, jobs print into their log files.
    - The table of results is rewritten whenever a job ends.
    """
    pending = PendingJobs(sweep, jobs)
    with Relay() as relay:
        while relay.running or (pending.jobs and not relay.is_stopping):
            if not relay.is_stopping and (sweep.records / "stop").exists():
                relay.stop_jobs(signal.SIGTERM)
            if pending.jobs and not relay.is_stopping and _start_next(pending, slots, relay, quiet=quiet):
                continue
            for one in [one for one in relay.running if one.process.poll() is not None]:
                relay.running.remove(one)
                relay.unfinished |= _end(sweep, one, quiet=quiet) != 0
            time.sleep(POLL_SECONDS)
        relay.unfinished |= bool(pending.jobs)
        return relay.is_stopping


def wait_for(sweep: Sweep, jobs: list[Job]) -> bool:
    """Wait until no other process runs any of the jobs. Return True if the sweep was stopped during the wait."""
    pending = PendingJobs(sweep, jobs)
    with Relay() as relay:
        while pending.jobs and not relay.is_stopping:
            found = pending.pop_free()
            if found is not None:
                found[1].close()
                continue
            time.sleep(POLL_SECONDS)
        return relay.is_stopping


def claim_slot(
    sweep: Sweep, slots: list[Slot] | None, *, used: Sequence[int]
) -> tuple[int, tuple[IO[str], ...]] | None:
    """Lock a free slot. Return its index and its lock files, or None if all slots are in use.

    A slot is a part of this machine that runs one job at a time.

    Args:
        sweep: sweep whose folder contains the lock files.
        slots: all slots of this machine, or None if the number of jobs at a time is unlimited.
        used: indices of the slots that this process uses. On file systems without locks, only these indices show which
            slots are in use.
    """
    if slots is None:
        return -1, ()
    for number in range(len(slots)):
        file = lock(sweep.records / f"slot-{number}.lock") if number not in used else None
        if file is not None:
            return number, (file,)
    return None


def _start_next(pending: PendingJobs, slots: list[Slot] | None, relay: Relay, *, quiet: bool) -> bool:
    """If a slot is free, start the first job in `pending` that must run and that no other process runs.

    The job is added to the running jobs of `relay`. If `quiet` is True, the job prints into its log file. Return True
    if a job was started.
    """
    claimed = claim_slot(pending.sweep, slots, used=[one.slot for one in relay.running])
    if claimed is None:
        if not relay.running:  # another sweep uses all slots
            pending.poll_busy()
        return False
    number, slot_locks = claimed
    found = pending.pop_free()
    if found is None:
        for file in slot_locks:
            file.close()
        return False
    job, job_lock = found
    slot = Slot() if slots is None else slots[number]
    process = _start(pending.sweep, job, slot, job_lock, quiet=quiet)
    relay.add(Running(job, process, number, (*slot_locks, job_lock)))
    return True


def _start(sweep: Sweep, job: Job, slot: Slot, job_lock: IO[str], *, quiet: bool) -> subprocess.Popen[bytes]:
    """Start the process of a job in a slot, and return the process.

    The process inherits the open lock file `job_lock`. Therefore the job stays locked even if the sweep is killed. If
    `quiet` is True, the job prints into its log file.
    """
    print_text(f"started     {sweep.title(job)} on {slot}" if quiet else f"\n=== {sweep.title(job)}")
    environment = os.environ | {PARENT: str(os.getpid())}
    if slot.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.devices)
    with pinned(slot.cores), output(log_of(sweep, job) if quiet else None) as file:
        line = command_line(sweep, job)
        process = subprocess.Popen(line, env=environment, stdout=file, stderr=file, pass_fds=[job_lock.fileno()])
    record_start(sweep, job, process.pid)
    return process


def _end(sweep: Sweep, one: Running, *, quiet: bool) -> int:
    """Record the end of the job `one`, release its locks, update the table of results, and return its exit code.

    `quiet` is True if the job printed into its log file. In this case, print a line with the status and the metric of
    the job.
    """
    code = one.process.wait()
    record_end(sweep, one.job, code)
    for file in one.locks:
        file.close()
    row = next(row for row in table.update(sweep) if row.name == one.job.name)
    if quiet:
        log = f"; its log: {log_of(sweep, one.job)}" if code not in (0, EXIT_STOPPED) else ""
        print_text(f"{row.status:11s} {sweep.title(one.job)}{row.metric_text(sweep.metric)}{log}")
    return code


@contextmanager
def pinned(cores: tuple[int, ...] | None) -> Iterator[None]:
    """Restrict processes that are started within the `with` block to the CPU cores `cores`; None = no restriction.

    The default number of threads of these processes depends on the number of cores.
    """
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def output(path: Path | None) -> Iterator[IO[bytes] | None]:
    """Open the output file `path` of a job for appending, within the `with` block.

    If `path` is None, yield None: the job prints to the console.
    """
    if path is None:
        yield None
        return
    with path.open("ab") as file:
        yield file
