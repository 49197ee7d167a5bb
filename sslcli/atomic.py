"""Files that are either the old or the new one, whole, whatever happens, and what tells whether they still are."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


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


def discard(path: Path) -> None:
    """Delete a file or a folder, if it is there. A folder loses its name first, so that none is seen half deleted."""
    if path.is_dir() and not path.is_symlink():
        doomed = path if path.suffix == ".tmp" else path.with_name(path.name + ".old.tmp")
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
