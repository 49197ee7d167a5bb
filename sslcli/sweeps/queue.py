"""Jobs on this machine, as many at once as it has devices for, each in a process of its own."""

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
from sslcli.sweeps import table
from sslcli.sweeps.job import (
    PARENT,
    Job,
    Sweep,
    command_line,
    enrol,
    is_at_work,
    is_due,
    log_of,
    note_end,
    note_start,
    take,
    who_runs,
)
from sslcli.system.cpu import usable
from sslcli.system.locks import lock

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # a job that gets one saves and stops
AS_TERM = (signal.SIGUSR2, signal.SIGHUP)  # jobs get SIGTERM for these
PAUSE = 0.05  # seconds between looks at the jobs
LOOK_EVERY = 0.5  # seconds between looks at a job that others are at work on
CORES_PER_JOB = 4  # more threads than this make a run of one process little faster


@dataclass(frozen=True)
class Slot:
    """The part of this machine that one job at a time gets."""

    devices: tuple[str, ...] | None = None  # CUDA devices it sees; None: those that this process sees
    cores: tuple[int, ...] | None = None  # processor cores it runs on; None: any

    def __str__(self) -> str:
        parts = [] if self.devices is None else [f"GPU {','.join(self.devices)}"]
        if self.cores is not None:
            first, last = self.cores[0], self.cores[-1]
            parts.append(f"core {first}" if first == last else f"cores {first}-{last}")
        return ", ".join(parts) or "this machine"


def slots_of(config: dict[str, Any], *, jobs: int | None, wanted: int | None) -> list[Slot]:
    """How this machine is shared out: `wanted` parts, or one a device, on the CPU one for every few cores.

    Args:
        config: of a job, which tells its device, threads and processes.
        jobs: there are no more parts than jobs; None: as many jobs as there are parts.
    """
    launcher = config.get("launcher", {"kind": "local"})
    if launcher["kind"] == "slurm":  # which needs no more of this machine than a submission does
        return [Slot()] * min(jobs or 1, wanted or jobs or 1)
    devices = cuda_devices(config["device"])
    cores = usable()
    processes = 1 if launcher["kind"] == "local" else launcher["processes"] or len(devices) or 2
    groups = [tuple(devices[i : i + processes]) for i in range(0, len(devices) - processes + 1, processes)]
    if devices or ":" in config["device"] or config["device"] == "mps":
        count = wanted or len(groups) or 1
    else:
        count = wanted or len(cores) // (processes * (launcher.get("threads") or CORES_PER_JOB)) or 1
    count = min(count, jobs or count)
    if count == 1:
        return [Slot(groups[0] if groups else None)]
    return [Slot(groups[i % len(groups)] if groups else None, share(cores, i, count)) for i in range(count)]


def share(cores: list[int], index: int, count: int) -> tuple[int, ...]:
    """The cores of one of `count` jobs: equal parts that do not overlap where there are enough."""
    if count >= len(cores):
        return (cores[index % len(cores)],)
    return tuple(cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def cuda_devices(device: str) -> list[str]:
    """The CUDA devices that jobs with this `device` can be shared out to, as CUDA_VISIBLE_DEVICES names them."""
    if device not in ("auto", "cuda"):
        return []
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


@dataclass
class Running:
    """A job at work."""

    job: Job
    process: subprocess.Popen[bytes]
    slot: int  # its number
    held: tuple[IO[str], ...]  # its slot, and the right to run it, until they are closed
    told: bool = False  # a process that ends may not have a handler any more for a second signal


def handed_on() -> list[signal.Signals]:
    """The signals that stop a sweep here: not SIGHUP where it is ignored, as under nohup, which its jobs do as well."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in HANDED_ON if number != signal.SIGHUP or not ignored]


class Relay:
    """For the time of a block, hands signals on to the jobs at work, which save and stop.

    Handlers that were there before are called after the block, when the jobs have saved: of a sweep that goes on to
    other jobs, and of a scheduler inside whose job this process runs, which queues that job again at a SIGUSR2.
    """

    def __init__(self) -> None:
        self.running: list[Running] = []
        self.received: list[int] = []
        self.told = False
        self.unfinished = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Relay:
        numbers = [*handed_on(), *([signal.SIGUSR2] if callable(signal.getsignal(signal.SIGUSR2)) else [])]
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(self.received) if kind is None else ():
            handler, again = self.previous[number], number != signal.SIGUSR2 or self.unfinished
            if callable(handler) and handler is not signal.default_int_handler and again:
                handler(number, None)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        self.received.append(number)
        self.tell(signal.SIGTERM if number in AS_TERM else number)

    def tell(self, number: int) -> None:
        """Send a signal to the jobs at work, and keep others from being started."""
        self.told = True
        for one in self.running:
            one.told = True
            one.process.send_signal(number)

    def add(self, one: Running) -> None:
        """Hand signals on to this job too, also those that arrived while it was started."""
        self.running.append(one)
        if self.told and not one.told:
            one.process.send_signal(signal.SIGTERM)


class Line:
    """The jobs that wait for their turn, and which of them somebody else is at work on.

    Args:
        sweep: they are part of it.
        jobs: in order.
    """

    def __init__(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        self.sweep, self.jobs = sweep, list(jobs)
        self.looks: dict[str, int] = {}  # at each job that was found busy, by its name
        self.look_again = 0.0

    def is_time(self) -> bool:
        """Whether to look at busy jobs again."""
        now = time.monotonic()
        again = now >= self.look_again
        if again:
            self.look_again = now + LOOK_EVERY
        return again

    def look(self) -> None:
        """Look which jobs are busy, without taking one."""
        for job in self.jobs if self.is_time() else ():
            if is_at_work(self.sweep, job.name, enrol(self.sweep, job)):
                self._note_busy(job)

    def take(self) -> tuple[Job, IO[str]] | None:
        """Take the first job that is due and free out of the line, with the right to run it; None where none is."""
        again = self.is_time()
        for job in list(self.jobs):
            if job.name in self.looks and not again:
                continue
            right = take(self.sweep, job)
            if right is None:
                self._note_busy(job)
                continue
            self.jobs.remove(job)
            if is_due(self.sweep, job, taken=True):
                return job, right
            right.close()
        return None

    def _note_busy(self, job: Job) -> None:
        """Say once that a job is waited for, unless it is free again at the second look."""
        self.looks[job.name] = self.looks.get(job.name, 0) + 1
        if self.looks[job.name] == 2:
            who = who_runs(self.sweep, job)
            print(f"waiting     {self.sweep.title(job)}: {who} is at work on it", flush=True)


def run_queue(sweep: Sweep, jobs: list[Job], slots: list[Slot] | None, *, quiet: bool) -> bool:
    """Run the jobs that are due, each when a slot is free (None: at once); whether the sweep was stopped.

    A job that somebody else is at work on is waited for, and run if it ends unfinished. Slots are held by locks in the
    sweep's folder, so that several processes on this machine can share them. With `quiet` jobs print into their logs.
    The table is written whenever a job ends.
    """
    line = Line(sweep, jobs)
    with Relay() as relay:
        while relay.running or (line.jobs and not relay.told):
            if not relay.told and (sweep.records / "stop").exists():
                relay.tell(signal.SIGTERM)
            if line.jobs and not relay.told and _start_next(line, slots, relay, quiet=quiet):
                continue
            for one in [one for one in relay.running if one.process.poll() is not None]:
                relay.running.remove(one)
                relay.unfinished |= _end(sweep, one, quiet=quiet) != 0
            time.sleep(PAUSE)
        relay.unfinished |= bool(line.jobs)
        return relay.told


def wait_for(sweep: Sweep, jobs: list[Job]) -> bool:
    """Wait until nobody is at work on any of the jobs; whether the sweep was stopped meanwhile."""
    line = Line(sweep, jobs)
    with Relay() as relay:
        while line.jobs and not relay.told:
            taken = line.take()
            if taken is not None:
                taken[1].close()
                continue
            time.sleep(PAUSE)
        return relay.told


def claim(sweep: Sweep, slots: list[Slot] | None, *, used: Sequence[int]) -> tuple[int, tuple[IO[str], ...]] | None:
    """The number of a free slot, and the file whose lock holds it; None where all are taken.

    Args:
        sweep: whose folder has the locks.
        slots: all there are; None: without end.
        used: numbers of the slots that this process uses, for a file system without locks.
    """
    if slots is None:
        return -1, ()
    for number in range(len(slots)):
        file = lock(sweep.records / f"slot-{number}.lock") if number not in used else None
        if file is not None:
            return number, (file,)
    return None


def _start_next(line: Line, slots: list[Slot] | None, relay: Relay, *, quiet: bool) -> bool:
    """Start the first job that is due and free, if there is a slot for it; whether one was started."""
    claimed = claim(line.sweep, slots, used=[one.slot for one in relay.running])
    if claimed is None:
        if not relay.running:  # another sweep has all slots
            line.look()
        return False
    number, held = claimed
    taken = line.take()
    if taken is None:
        for file in held:
            file.close()
        return False
    job, right = taken
    slot = Slot() if slots is None else slots[number]
    process = _begin(line.sweep, job, slot, right, quiet=quiet)
    relay.add(Running(job, process, number, (*held, right)))
    return True


def _begin(sweep: Sweep, job: Job, slot: Slot, right: IO[str], *, quiet: bool) -> subprocess.Popen[bytes]:
    """Start the process of a job, which shares the right to run it and keeps it if this one is killed."""
    print(f"started     {sweep.title(job)} on {slot}" if quiet else f"\n=== {sweep.title(job)}", flush=True)
    environment = os.environ | {PARENT: str(os.getpid())}
    if slot.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.devices)
    with pinned(slot.cores), output(log_of(sweep, job) if quiet else None) as file:
        line = command_line(sweep, job)
        process = subprocess.Popen(line, env=environment, stdout=file, stderr=file, pass_fds=[right.fileno()])
    note_start(sweep, job, process.pid)
    return process


def _end(sweep: Sweep, one: Running, *, quiet: bool) -> int:
    """Note how a job ended; its exit code."""
    code = one.process.wait()
    note_end(sweep, one.job, code)
    for file in one.held:
        file.close()
    row = next(row for row in table.update(sweep) if row.name == one.job.name)
    if quiet:
        why = f"; what it printed: {log_of(sweep, one.job)}" if code not in (0, EXIT_STOPPED) else ""
        print(f"{row.status:11s} {sweep.title(one.job)}{row.told(sweep.metric)}{why}", flush=True)
    return code


@contextmanager
def pinned(cores: tuple[int, ...] | None) -> Iterator[None]:
    """Processes started in this block run on these cores, and size their thread pools by them."""
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
    """The file a process prints to, opened to go on at its end; None: where this process prints."""
    if path is None:
        yield None
        return
    with path.open("ab") as file:
        yield file
