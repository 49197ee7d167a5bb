"""Environment variables by which a launcher such as torchrun describes the process group of a run.

No other module reads these variables. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from sslcli.errors import ConfigError

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Environment variables that our agent sets for its processes. The agent (`sslcli.distributed.elastic`) starts and
# restarts the processes of a run on one node.
AGENT = "SSLCLI_AGENT"  # process id of the agent
START_TIME = "SSLCLI_BEGUN"  # start time of the agent, by time.monotonic
RESTARTS = "SSLCLI_RESTARTS"  # number of earlier starts of the processes
# Path ATTEMPT/LOCAL_RANK/error.json, set by torch's elastic agent, which torchrun and our agent use. The folder ATTEMPT
# belongs to one start of the processes of this node.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True)
class Member:
    """Place of this process in the process group of a run.

    Attributes:
        rank: rank, in [0, world_size).
        world_size: number of processes of the run.
        local_rank: rank among the processes of this node.
        address: host of rank 0.
        port: TCP port of rank 0.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def launched() -> Member | None:
    """Return rank, world size and the address of rank 0, or None if no launcher started this process.

    If RANK or WORLD_SIZE is set, a launcher started this process, and all variables in `REQUIRED` must be set. If only
    MASTER_ADDR and MASTER_PORT are set, they are ignored, since scripts often export them for other programs.

    Raises ConfigError if RANK or WORLD_SIZE is set but another variable in `REQUIRED` is not, or if a value is invalid.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not given:
        return None
    missing = [name for name in REQUIRED if name not in os.environ]
    if missing:
        values = " and ".join(f"{name} is {os.environ[name]!r}" for name in given)
        raise ConfigError(
            f"in the environment, {values}, but {' and '.join(missing)} {_are(missing)} not set. A launcher such as "
            f"torchrun sets all of {', '.join(REQUIRED)}: set all of them, or remove the others (unset "
            f"{' '.join(given)}) to start without such a launcher"
        )
    world_size = _count("WORLD_SIZE", least=1)
    rank = _count("RANK", least=0, most=world_size - 1, reason=f" (WORLD_SIZE is {world_size})")
    if not os.environ["MASTER_ADDR"].strip():
        raise ConfigError("the environment variable MASTER_ADDR is empty: set it to the host of rank 0")
    port = _count("MASTER_PORT", least=1, most=65535)
    local_rank = _count("LOCAL_RANK", least=0) if "LOCAL_RANK" in os.environ else rank
    return Member(rank, world_size, local_rank, os.environ["MASTER_ADDR"], port)


def local_world_size() -> int:
    """Return the number of processes of the run on this node, or 1 if LOCAL_WORLD_SIZE is not set."""
    return _count("LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in os.environ else 1


def earlier_starts() -> int:
    """Return how many times the processes of this run have been restarted.

    The elastic agents of sslcli and torchrun, and the job script of Slurm, restart processes and count the restarts in
    environment variables.
    """
    return sum(_count(name, least=0) for name in (RESTARTS, "TORCHELASTIC_RESTART_COUNT") if name in os.environ)


def is_first_to_report(message: str) -> bool:
    """Return False if another process of this node has called this function with the same message, else True.

    Only the processes of one start by an elastic agent are considered. Without an agent, the result is always True. The
    first process writes its local rank to a file in the folder in which the agent keeps the error files of this start.
    """
    if not os.environ.get(ERROR_FILE):
        return True
    digest = hashlib.sha256(message.encode(errors="backslashreplace")).hexdigest()[:16]
    path = Path(os.environ[ERROR_FILE]).parents[1] / f"reported-{digest}"
    rank = os.environ.get("LOCAL_RANK", "")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(rank)
    except FileExistsError:  # a script may start several commands with one local rank, each of which reports
        return path.read_text(encoding="utf-8") == rank
    except OSError:  # for example a full disk: a message that is printed twice is better than none
        return True
    return True


def _count(name: str, *, least: int, most: int | None = None, reason: str = "") -> int:
    """Return the environment variable `name` as an integer.

    Raises ConfigError unless the value is an integer between `least` and `most`. If `most` is None, there is no
    maximum. `reason` is the reason for the maximum, for the message.
    """
    text = os.environ[name]
    number = int(text) if text.strip().isdecimal() and text.isascii() else None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"between {least} and {most}"
        raise ConfigError(
            f"the environment variable {name} is {text!r}, but it must be an integer {allowed}{reason}: correct it, or "
            f"remove it (unset {name}) if no launcher such as torchrun starts this command"
        )
    return number


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
