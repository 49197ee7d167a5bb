"""Files that are either the old or the new one, whole, whatever happens."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old or the new one, whole, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    synchronise(temporary)
    os.replace(temporary, path)


def synchronise(path: Path) -> None:
    """Make sure a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
