"""Launchers: this process alone, one process of an outer launcher, or N processes per node.

Only RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* are read, whoever sets them. Processes are started by torch's elastic
agent.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from sslcli.distributed import collectives, watchdog
from sslcli.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED, ConfigError
from sslcli.system import cores

# Environment variables that our agent sets for its processes.
AGENT = "SSLCLI_AGENT"  # its process id
BEGUN = "SSLCLI_BEGUN"  # its start time, by time.monotonic
RESTARTS = "SSLCLI_RESTARTS"  # number of earlier starts
EXIT_LOST = 4  # exit code of a process to our agent: worth a restart. The user sees EXIT_FAILED
REMEDY = "The usual cause of SIGKILL is too little memory"


def joined() -> bool:
    """Return True if a launcher (torchrun, our own agent, Slurm) started this process as a rank of a process group."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def number() -> int:
    """Return the rank of this process, also before the process group is initialized; 0 is the main process."""
    return int(os.environ["RANK"]) if joined() else 0


def lost_contact(error: RuntimeError) -> bool:
    """Return True if torch raises this error when another process of the run has ended."""
    return joined() and (isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed" in str(error))


def pick_device(name: str) -> torch.device:
    """Return the device of this process, with an index for CUDA. "auto" is CUDA or the CPU (MPS is untested).

    Raises ConfigError, with the available kinds of device, if it is not available.
    """
    if name == "auto":
        name = "cuda" if "cuda" in available() else "cpu"
    if name == "mps" and joined():
        raise ConfigError("device is 'mps', on which processes cannot meet: take device=cpu, or launcher=local")
    kind = name.partition(":")[0]
    if kind not in available():
        raise ConfigError(f"device is {name!r}, but this machine has only: {', '.join(available())}")
    if name == "cuda":  # torch sets no current device without an index
        rank = int(os.environ.get("LOCAL_RANK", 0)) if joined() else 0
        name = f"cuda:{rank % torch.cuda.device_count()}"
    elif name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1 and joined():
        raise ConfigError(
            f"device is {name!r}, but each process of a run needs a GPU of its own: take device=cuda, and "
            "CUDA_VISIBLE_DEVICES to choose among them"
        )
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def available() -> list[str]:
    """Return the kinds of device of this machine."""
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds.append("cuda")
    if torch.backends.mps.is_available():
        kinds.append("mps")
    return kinds


@contextmanager
def process_group(device: torch.device, *, limit: float, end: Callable[[str], None]) -> Iterator[None]:
    """Initialize the process group for the duration of the block, if the run has several processes.

    `end(message)` is called on each process, from a thread, after `limit` seconds without progress; see `heartbeat`.
    """
    if not joined():
        with watchdog.watched_alone(limit=limit, end=end):
            yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        collectives.end_with(os.getppid())  # the agent, ours or torchrun's
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = watchdog.join(limit)
    with watchdog.watched(store, rank=number(), size=int(os.environ["WORLD_SIZE"]), limit=limit, end=end):
        watchdog.meet()
        # The heartbeat distinguishes a hang from a long wait; this timeout is a fallback.
        dist.init_process_group(backend, timeout=timedelta(seconds=max(10 * limit, 3600)))
        try:
            yield
        except BaseException:
            if device.type != "cuda":  # NCCL would wait for the others before the error here is reported
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def prepare(device: torch.device, *, deterministic: bool, compiled: bool = False) -> None:
    """Set the device of this process, and deterministic kernels if `deterministic`.

    A warning names operations without a deterministic kernel. `compiled` also applies the setting to torch.compile,
    whose import takes seconds.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if compiled:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.set_deterministic_debug_mode("warn" if deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:  # older versions of torch warn about every matrix product without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def share_threads(threads: int | None) -> None:
    """Set the number of CPU threads to `threads`, or to an equal fraction of the cores per process on the machine."""
    torch.set_num_threads(threads or cores.share())


def die_with_parent() -> None:
    """Make this process end when our agent, which started it, ends, even by SIGKILL."""
    collectives.end_with(int(os.environ[AGENT]))


def restarted() -> bool:
    """Return True if these processes were restarted, by our agent, by torchrun, or by the Slurm job script."""
    return int(os.environ.get(RESTARTS, 0)) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def begun() -> float:
    """Return the start time of the command by `time.monotonic`; with our agent, that of the first start."""
    return float(os.environ.get(BEGUN, time.monotonic()))


def exit_lost() -> int:
    """Return the exit code of a process that lost another: EXIT_LOST under our agent, which may then restart all."""
    return EXIT_LOST if AGENT in os.environ else EXIT_FAILED


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
