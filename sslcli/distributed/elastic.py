"""Launch of several processes per node with torch's elastic agent, with restarts after a crash.

The agent is the process on each node that starts the training processes and waits for them.
"""

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

from sslcli.distributed.processes import EXIT_LOST
from sslcli.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED, ConfigError
from sslcli.system.launch_variables import AGENT, RESTARTS, START_TIME, earlier_starts


@dataclass(frozen=True)
class Rendezvous:
    """Address and name that the elastic agents of all nodes use to find each other.

    The agent is the process on each node that starts the training processes.
    """

    name: str  # identical on all nodes, different for each start
    nodes: int = 1
    node: int = 0  # rank of this node
    endpoint: str = "localhost:0"  # host:port of node 0


def run_processes(
    arguments: list[str],
    *,
    processes: int | None,
    max_restarts: int,
    on_message: Callable[[str], None],
    rendezvous: Rendezvous | None = None,
    restarts_from: str = "the last checkpoint",
) -> int:
    """Run `python ARGUMENTS` in several processes on this node. Return one exit code for all processes.

    torch's elastic agent starts the processes. The agent could also restart them, but it would do so after any failure,
    even if the failure would repeat (an invalid configuration, a failed training). Therefore restarts by the agent are
    disabled. Instead, this function starts a new agent if a process crashed or was killed.

    Args:
        processes: number of processes; None = one per GPU, or 2 without GPUs.
        max_restarts: maximum number of restarts. Each restart starts all processes again.
        on_message: function that prints a message. It is called before each restart, and after a crash that does not
            lead to a restart.
        rendezvous: address and name by which the agents of several nodes find each other; None for one node. With a
            rendezvous, `run_processes` must be called on all nodes. If a process crashes and no restart is left,
            `run_processes` then returns EXIT_LOST. With a rendezvous, the agent also ignores SIGUSR1 and SIGUSR2: the
            scheduler sends these signals to every process of the job, so the training processes receive them too. They
            all stop after the same step.
        restarts_from: where restarted processes continue, for the message.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    count = processes or (torch.cuda.device_count() if torch.cuda.is_available() else 2)
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise ConfigError(f"launcher.processes is {count}, but this node has {torch.cuda.device_count()} CUDA devices")

    def forward(signum: int, frame: FrameType | None) -> None:
        raise SignalException(f"got signal {signum}", signal.SIGTERM)  # the agent itself does this on SIGTERM

    schedulers = (signal.SIGUSR1, signal.SIGUSR2)
    # nohup makes the command ignore SIGHUP, but torch's agent installs its own handler. Therefore SIGHUP is blocked.
    nohup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, nohup)
    before = {number: signal.signal(number, forward if rendezvous is None else signal.SIG_IGN) for number in schedulers}
    environment, earlier = dict(os.environ), earlier_starts()
    # The agent kills processes that take longer than this timeout to save and exit.
    os.environ |= {AGENT: str(os.getpid()), START_TIME: str(time.monotonic()), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print their own errors
    try:
        for restart in range(max_restarts + 1):
            os.environ[RESTARTS] = str(earlier + restart)
            codes = run_once(arguments, count, rendezvous or Rendezvous(name=f"{os.getpid()}-{restart}"))
            if not crashed(codes) or restart == max_restarts:
                break
            attempt = f"restart {restart + 1} of {max_restarts}"
            on_message(f"{describe_exits(codes)}; all start again from {restarts_from} ({attempt})")
    except SignalException:
        return EXIT_STOPPED
    finally:
        os.environ.clear()
        os.environ |= environment
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in nohup:  # otherwise torch's handler would receive signals that arrived while they were blocked
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if crashed(codes) and rendezvous is not None:  # the command that started the nodes may restart all of them
        on_message(f"{describe_exits(codes)}{memory_hint(codes)}")
        return EXIT_LOST
    if crashed(codes):
        after = f" after {max_restarts} restarts" if max_restarts else ""
        on_message(f"{describe_exits(codes)}{after}{memory_hint(codes)}; run the same command again to resume")
    return exit_code(codes)


def run_once(arguments: list[str], count: int, rendezvous: Rendezvous) -> dict[int, int]:
    """Run `python ARGUMENTS` in `count` processes on this node.

    Return rank -> exit code for the processes that failed, see `first_failures`, or {} if no process failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=rendezvous.nodes,
        max_nodes=rendezvous.nodes,
        nproc_per_node=count,
        run_id=f"sslcli-{rendezvous.name}",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous.endpoint,
        local_addr="127.0.0.1" if rendezvous.nodes == 1 else None,  # the hostname of a laptop may not resolve
        # The first node may take minutes to import torch from a shared file system.
        rdzv_configs={"is_host": rendezvous.node == 0, "read_timeout": 300},
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return first_failures({rank: failure.exitcode for rank, failure in error.failures.items()})
    except (RendezvousError, dist.DistError):
        if rendezvous.nodes == 1:
            raise
        return {rendezvous.node * count: EXIT_LOST}
    return {}


def first_failures(codes: dict[int, int]) -> dict[int, int]:
    """Return `codes` (rank -> exit code) without the processes that were ended by SIGTERM.

    After the first failure, torch's elastic agent ends all other processes with SIGTERM, so these processes did not
    fail themselves. If SIGTERM ended all processes, return all of `codes`.
    """
    return {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes


def crashed(codes: dict[int, int]) -> bool:
    """Return True if a restart is useful, because the failure may not repeat.

    `codes` maps ranks to exit codes. A restart is useful if a signal ended a process (its exit code is then negative),
    or if a process lost contact with the others (EXIT_LOST). There are two exceptions, in which a restart is not
    useful. If any process ended with EXIT_CONFIG or EXIT_FAILED, the failure would repeat. If any process ended with
    EXIT_STOPPED, the run was stopped on purpose.
    """
    is_final = bool({EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED} & set(codes.values()))
    return not is_final and any(code < 0 or code == EXIT_LOST for code in codes.values())


def describe_exits(codes: dict[int, int]) -> str:
    """Return text that lists how the process of each rank ended, for messages. `codes` maps ranks to exit codes."""
    return ", ".join(f"process {rank} {describe_exit(code)}" for rank, code in sorted(codes.items()))


def memory_hint(codes: dict[int, int]) -> str:
    """Return a sentence about too little memory if SIGKILL ended a process, else "". `codes`: rank -> exit code."""
    return ". The usual cause of SIGKILL is too little memory" if -signal.SIGKILL in codes.values() else ""


def describe_exit(code: int) -> str:
    """Return a phrase for the exit code of one process. A code -n means that signal n ended the process."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return "lost contact with the others" if code == EXIT_LOST else f"ended with exit code {code}"


def exit_code(codes: dict[int, int]) -> int:
    """Return one exit code for all processes of a run, or 0 if no process failed.

    `codes` maps the ranks of the failed processes to their exit codes. The result is the first of these codes that a
    failed process has: 2 (invalid configuration), 3 (training failed), 75 (stopped). If none has such a code, the
    result is 3 if a process was killed by a signal or lost another process, and 1 otherwise.
    """
    if not codes:
        return 0
    known = (code for code in (EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED) if code in codes.values())
    lost = any(code < 0 or code == EXIT_LOST for code in codes.values())
    return next(known, EXIT_FAILED if lost else 1)
