"""Start of N processes per node under torch's elastic agent, with restarts."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

from sslcli.distributed.processes import AGENT, BEGUN, EXIT_LOST, RESTARTS
from sslcli.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED, ConfigError

REMEDY = "The usual cause of SIGKILL is too little memory"


@dataclass(frozen=True)
class Meeting:
    """Rendezvous of the agents of a run."""

    name: str  # the same on all nodes, unique per start
    nodes: int = 1
    node: int = 0  # rank of this node
    endpoint: str = "localhost:0"  # host:port, on node 0


def run_processes(
    arguments: list[str],
    *,
    processes: int | None,
    max_restarts: int,
    tell: Callable[[str], None],
    meeting: Meeting | None = None,
) -> int:
    """Run `python ARGUMENTS` in `processes` processes on this node (None: one per device) and return their exit code.

    If one crashes or is killed, all are restarted, up to `max_restarts` times. Failures that would repeat (an invalid
    configuration, a failed training) are not retried. torch's agent does not distinguish exit codes when it restarts,
    so each start has an agent of its own. `tell(message)` gets the reason of each restart and of a final crash.

    With a `meeting`, call this function on all its nodes to start all processes. SIGUSR1 and SIGUSR2, which a scheduler
    sends to every process of a job, are then handled by the processes, which agree on the step to stop after. After a
    crash the return value is EXIT_LOST.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    count = processes or (torch.cuda.device_count() if torch.cuda.is_available() else 2)
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise ConfigError(f"launcher.processes is {count}, but this node has {torch.cuda.device_count()} CUDA devices")

    def forward(signum: int, frame: FrameType | None) -> None:
        raise SignalException(f"got signal {signum}", signal.SIGTERM)  # as the agent itself does on SIGTERM

    schedulers = (signal.SIGUSR1, signal.SIGUSR2)
    # torch's agent replaces the SIGHUP handler, so its processes lose what nohup set. A blocked signal stays blocked.
    nohup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, nohup)
    before = {number: signal.signal(number, forward if meeting is None else signal.SIG_IGN) for number in schedulers}
    environment = dict(os.environ)
    # The agent kills processes that take longer than this timeout to save and exit.
    os.environ |= {AGENT: str(os.getpid()), BEGUN: str(time.monotonic()), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print why they end
    try:
        for restart in range(max_restarts + 1):
            os.environ[RESTARTS] = str(int(environment.get(RESTARTS, 0)) + restart)
            codes = run_once(arguments, count, meeting or Meeting(name=f"{os.getpid()}-{restart}"))
            if not crashed(codes) or restart == max_restarts:
                break
            tell(f"{losses(codes)}; all start again from the last checkpoint (restart {restart + 1} of {max_restarts})")
    except SignalException:
        return EXIT_STOPPED
    finally:
        os.environ.clear()
        os.environ |= environment
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in nohup:  # else torch's handler would receive signals that arrived meanwhile
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if crashed(codes) and meeting is not None:  # the launcher of the nodes may restart all of them
        tell(f"{losses(codes)}. {REMEDY}")
        return EXIT_LOST
    if crashed(codes):
        after = f" after {max_restarts} restarts" if max_restarts else ""
        tell(f"{losses(codes)}{after}. {REMEDY}; start the same command again to go on")
    return exit_code(codes)


def run_once(arguments: list[str], count: int, meeting: Meeting) -> dict[int, int]:
    """Run `python ARGUMENTS` in `count` processes; return the exit codes by rank of those that failed first, or {}."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=meeting.nodes,
        max_nodes=meeting.nodes,
        nproc_per_node=count,
        run_id=f"sslcli-{meeting.name}",
        rdzv_backend="c10d",
        rdzv_endpoint=meeting.endpoint,
        local_addr="127.0.0.1" if meeting.nodes == 1 else None,  # the hostname of a laptop may not resolve
        # The first node may take minutes to import torch from a shared file system.
        rdzv_configs={"is_host": meeting.node == 0, "read_timeout": 300},
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return causes({rank: failure.exitcode for rank, failure in error.failures.items()})
    except (RendezvousError, dist.DistError):
        if meeting.nodes == 1:
            raise
        return {meeting.node * count: EXIT_LOST}
    return {}


def causes(codes: dict[int, int]) -> dict[int, int]:
    """Return `codes` without the processes that the agent ended by SIGTERM, unless there are no others."""
    return {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes


def crashed(codes: dict[int, int]) -> bool:
    """Return True if the failure may not repeat, so a restart is useful; `codes` by rank, negative for a signal."""
    told = {EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED} & set(codes.values())
    return not told and any(code < 0 or code == EXIT_LOST for code in codes.values())


def losses(codes: dict[int, int]) -> str:
    """Return a message with how each process ended, by rank."""
    return ", ".join(f"process {rank} {how_it_ended(code)}" for rank, code in sorted(codes.items()))


def how_it_ended(code: int) -> str:
    """Return an exit code as a phrase."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return "could not go on" if code == EXIT_LOST else f"ended with exit code {code}"


def exit_code(codes: dict[int, int]) -> int:
    """Return one exit code for the exit codes of the processes by rank."""
    if not codes:
        return 0
    told = (code for code in (EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED) if code in codes.values())
    lost = any(code < 0 or code == EXIT_LOST for code in codes.values())
    return next(told, EXIT_FAILED if lost else 1)
