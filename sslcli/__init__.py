"""Self-supervised pre-training of vision models."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sslcli.config.moved import MovedModules

if TYPE_CHECKING:
    from sslcli.runs.encoder import Encoder as Encoder
    from sslcli.runs.encoder import load as load

__version__ = "0.2.0"

sys.meta_path.insert(0, MovedModules())  # else submodules of a moved package would be loaded twice


def __getattr__(name: str) -> Any:
    """Import a part of the Python API when it is first used, because the import of torch takes seconds."""
    if name in ("Encoder", "load"):
        from sslcli.runs import encoder as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
