"""Child processes: Python that imports nothing from the current directory, and children that end with their parent.

`python -m` and `python -c` search the current directory before the standard library, so an unrelated `yaml.py` there
would be executed. Option -P prevents that since Python 3.11.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SAFE_PATH = (3, 11)  # the first version with -P
WITHOUT = "import sys; sys.path[:1] = [path for path in sys.path[:1] if path]; import runpy; "


def arguments(module: str, *, ours: bool = True) -> list[str]:
    """Return the Python arguments that run a module without importing from the current directory.

    Args:
        module: its name; append its own arguments after these.
        ours: True if the process uses this interpreter; another one may have any version.
    """
    if ours and sys.version_info >= SAFE_PATH:
        return ["-P", "-m", module]
    return ["-c", f"{WITHOUT}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]


@contextmanager
def safe_children() -> Iterator[None]:
    """Set PYTHONSAFEPATH within the block, for Python subprocesses started by other packages.

    It has the effect of -P in `arguments`, since Python 3.11.
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
    """Append the current directory to sys.path if `trust` is not empty; installed packages come first."""
    if trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def kill_with_parent(parent: int) -> None:
    """Kill this process when its `parent` exits or is killed, so that no orphan holds a run (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent exited before prctl was called
            os.kill(os.getpid(), signal.SIGKILL)
