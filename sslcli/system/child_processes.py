"""Child processes that import nothing from the current directory, and that end when their parent ends.

`python -m` and `python -c` search the current directory first when they import a module. They would therefore execute
an unrelated file `yaml.py` in the current directory. Since Python 3.11, option -P prevents this search.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sslcli.errors import ConfigError

SAFE_PATH = (3, 11)  # first Python version with option -P
WITHOUT = "import sys; sys.path[:1] = [path for path in sys.path[:1] if path]; import runpy; "


def arguments(module: str, *, ours: bool = True) -> list[str]:
    """Return the arguments of a Python interpreter that run a module without importing from the current directory.

    Args:
        module: name of the module; append the module's own arguments to the result.
        ours: True if the interpreter of this process runs the module. False if another interpreter, whose Python
            version is unknown, runs the module.
    """
    if ours and sys.version_info >= SAFE_PATH:
        return ["-P", "-m", module]
    return ["-c", f"{WITHOUT}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]


def given_arguments(
    module: str, *names: str, launcher: str, variables: Sequence[str], command: str = "ssl-train"
) -> list[str]:
    """Return the command-line arguments of this process, which runs `module` as a child process of a command.

    Args:
        module: name of the module.
        names: names of its arguments, for the message.
        launcher: value of `launcher=...` with which the command runs the module.
        variables: environment variables that the launcher sets.
        command: the command that runs the module: ssl-train or ssl-eval.

    Raises ConfigError if the number of arguments is wrong or a variable is missing. The cause is usually that a user
    ran the module directly, instead of the command.
    """
    missing = [name for name in variables if name not in os.environ]
    if len(sys.argv) != len(names) + 1 or missing:
        reason = f"the environment variable {missing[0]} is missing. " if missing else ""
        raise ConfigError(
            f"{reason}usage: python -m {module} {' '.join(names)}. {command} launcher={launcher} runs this module in "
            f"its processes: run {command} instead"
        )
    return sys.argv[1:]


@contextmanager
def safe_children() -> Iterator[None]:
    """Set PYTHONSAFEPATH within the `with` block, for Python subprocesses that other packages start.

    Since Python 3.11, PYTHONSAFEPATH has the effect of option -P.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def find_trusted(trust: Sequence[str]) -> None:
    """Append the current directory to sys.path if `trust` is not empty. Installed packages still have priority.

    `trust` are the names of the packages that the user trusts. They may be in the current directory.
    """
    if trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def kill_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent process exits or is killed (Linux only).

    `parent` is the process ID of the parent process. Without this call, the process could continue without its parent,
    and keep its run locked.
    """
    signal_with_parent(parent, signal.SIGKILL)


def signal_with_parent(parent: int, number: signal.Signals) -> None:
    """Let the kernel send the signal `number` to this process when its parent process ends (Linux only).

    `parent` is the process ID of the parent process. The signal is also sent if the parent process is killed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent exited before prctl was called
            os.kill(os.getpid(), number)
