"""Run in this process, as one of the processes an outer launcher started, or on N processes of each node.

Only RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* are read; who sets them does not matter. Engine: torch's elastic agent.
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

from sslcli import cores, distributed, heartbeat
from sslcli.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED, ConfigError

# What our agent leaves in the environment of the processes it starts.
AGENT = "SSLCLI_AGENT"  # its process id
BEGUN = "SSLCLI_BEGUN"  # when it began, on the clock of time.monotonic
RESTARTS = "SSLCLI_RESTARTS"  # how many starts came before
EXIT_LOST = 4  # from a process to our agent: what ended it need not happen again. The user sees EXIT_FAILED
REMEDY = "The usual cause of SIGKILL is too little memory"


def joined() -> bool:
    """Whether an outer launcher (torchrun, our own agent, Slurm) started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def number() -> int:
    """This process's place among those of the run, 0 for the main one, also while they are not joined."""
    return int(os.environ["RANK"]) if joined() else 0


def lost_contact(error: RuntimeError) -> bool:
    """Whether this is what torch raises when another process of the run has ended."""
    return joined() and (isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed" in str(error))


def pick_device(name: str) -> torch.device:
    """The device of this process, with an index for CUDA; "auto" is CUDA or the CPU, for MPS has not been tried.

    Raises ConfigError, naming what there is, where it is not available.
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
    """Kinds of device this machine has."""
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds.append("cuda")
    if torch.backends.mps.is_available():
        kinds.append("mps")
    return kinds


@contextmanager
def process_group(device: torch.device, *, limit: float, end: Callable[[str], None]) -> Iterator[None]:
    """The processes of this run, joined for the time of the block where there are several.

    `end(message)` is called on each, from a thread, once none went on for `limit` seconds; see `heartbeat`.
    """
    if not joined():
        with heartbeat.watched_alone(limit=limit, end=end):
            yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        distributed.end_with(os.getppid())  # the agent, whoever started it
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = heartbeat.join(limit)
    with heartbeat.watched(store, rank=number(), size=int(os.environ["WORLD_SIZE"]), limit=limit, end=end):
        heartbeat.meet()
        # The heartbeat knows a hang from a long wait; this limit is for the case that it fails.
        dist.init_process_group(backend, timeout=timedelta(seconds=max(10 * limit, 3600)))
        try:
            yield
        except BaseException:
            if device.type != "cuda":  # NCCL would wait for the others, while what went wrong here is not told
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def prepare(device: torch.device, *, deterministic: bool, compiled: bool = False) -> None:
    """Make `device` the one of this process, and prefer kernels that give the same result every time.

    A warning names the kernels that cannot. `compiled` tells the compiler as well, whose import takes seconds.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if compiled:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.set_deterministic_debug_mode("warn" if deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:  # older versions of torch warn of every product without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def share_threads(threads: int | None) -> None:
    """Use `threads` CPU threads, or an equal share of the machine's for each process on it."""
    torch.set_num_threads(threads or cores.share())


def die_with_parent() -> None:
    """End this process, which our own agent started, when the agent ends, even by SIGKILL."""
    distributed.end_with(int(os.environ[AGENT]))


def restarted() -> bool:
    """Whether these processes were started again, by our own agent, by torchrun, or by the script of their job."""
    return int(os.environ.get(RESTARTS, 0)) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def begun() -> float:
    """When the command of this process began, on the clock of `time.monotonic`; restarts count from the first start."""
    return float(os.environ.get(BEGUN, time.monotonic()))


def exit_lost() -> int:
    """The exit code of a process that lost another: our agent is told apart from what would only fail again."""
    return EXIT_LOST if AGENT in os.environ else EXIT_FAILED


@dataclass(frozen=True)
class Meeting:
    """Where the agents of a run find each other."""

    name: str  # the same on all nodes, another one for every start
    nodes: int = 1
    node: int = 0  # the number of this one
    endpoint: str = "localhost:0"  # host:port, on node 0


def run_processes(
    arguments: list[str],
    *,
    processes: int | None,
    max_restarts: int,
    tell: Callable[[str], None],
    meeting: Meeting | None = None,
) -> int:
    """Run `python ARGUMENTS` on `processes` processes of this node (None: one a device) and return their exit code.

    When one crashes or is killed, all are started again, up to `max_restarts` times. What would only happen again, a
    wrong configuration, a training that failed, is not repeated, so each start has an agent of its own: the restarts
    of torch's agent make no difference between exit codes. `tell` gets why they start again or end.

    With a `meeting` the same call on its other nodes starts the other processes, and SIGUSR1 and SIGUSR2, which a
    scheduler sends to every process of a job, are left to the processes: they agree on the step to stop after. After a
    crash the code is EXIT_LOST.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    count = processes or (torch.cuda.device_count() if torch.cuda.is_available() else 2)
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise ConfigError(f"launcher.processes is {count}, but this node has {torch.cuda.device_count()} CUDA devices")

    def forward(signum: int, frame: FrameType | None) -> None:
        raise SignalException(f"got signal {signum}", signal.SIGTERM)  # what the agent itself does at a SIGTERM

    schedulers = (signal.SIGUSR1, signal.SIGUSR2)
    # torch's agent takes SIGHUP over, and its processes start without what nohup set; a blocked signal stays blocked.
    nohup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, nohup)
    before = {number: signal.signal(number, forward if meeting is None else signal.SIG_IGN) for number in schedulers}
    environment = dict(os.environ)
    # The agent kills processes that take longer than this to save and end.
    os.environ |= {AGENT: str(os.getpid()), BEGUN: str(time.monotonic()), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes tell why they end
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
        for number in nohup:  # the handler that torch left would get what came meanwhile
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if crashed(codes) and meeting is not None:  # who started the nodes may start all of them again
        tell(f"{losses(codes)}. {REMEDY}")
        return EXIT_LOST
    if crashed(codes):
        after = f" after {max_restarts} restarts" if max_restarts else ""
        tell(f"{losses(codes)}{after}. {REMEDY}; start the same command again to go on")
    return exit_code(codes)


def run_once(arguments: list[str], count: int, meeting: Meeting) -> dict[int, int]:
    """Run `python ARGUMENTS` on `count` processes; exit codes by rank of those that ended badly first, {} for none."""
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
        local_addr="127.0.0.1" if meeting.nodes == 1 else None,  # a laptop may not find itself by its name
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
    """`codes` without the processes that the agent ended by SIGTERM because of another."""
    return {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes


def crashed(codes: dict[int, int]) -> bool:
    """Whether processes ended by something that need not happen again; `codes` by rank, negative for a signal."""
    told = {EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED} & set(codes.values())
    return not told and any(code < 0 or code == EXIT_LOST for code in codes.values())


def losses(codes: dict[int, int]) -> str:
    """What happened to the processes, by rank."""
    return ", ".join(f"process {rank} {how_it_ended(code)}" for rank, code in sorted(codes.items()))


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return "could not go on" if code == EXIT_LOST else f"ended with exit code {code}"


def exit_code(codes: dict[int, int]) -> int:
    """One exit code from those of the processes by rank."""
    if not codes:
        return 0
    told = (code for code in (EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED) if code in codes.values())
    lost = any(code < 0 or code == EXIT_LOST for code in codes.values())
    return next(told, EXIT_FAILED if lost else 1)
