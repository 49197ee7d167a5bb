"""Python processes that run a module of ours, and what they may import from the current directory: nothing but trust.

`python -m` and `python -c` look for every module in the current directory first, before the standard library, so a
`yaml.py` that lies there by chance would run. Option -P keeps that from happening from Python 3.11 on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SAFE_PATH = (3, 11)  # the first version that knows -P
WITHOUT = "import sys; sys.path[:1] = [path for path in sys.path[:1] if path]; import runpy; "


def arguments(module: str, *, ours: bool = True) -> list[str]:
    """What Python needs to run a module that is not looked for in the current directory, nor what it imports.

    Args:
        module: its name; arguments of its own follow.
        ours: the process runs on this interpreter. Another one may be of any version.
    """
    if ours and sys.version_info >= SAFE_PATH:
        return ["-P", "-m", module]
    return ["-c", f"{WITHOUT}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]


@contextmanager
def safe_children() -> Iterator[None]:
    """In this block the Python processes that other packages start do as those of `arguments` (from 3.11 on)."""
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
    """Let packages that the user trusts lie in the current directory, after all that is installed."""
    if trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
