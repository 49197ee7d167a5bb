"""Part files of unfinished features, with which ssl-embed resumes after it was killed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TypedDict
from zipfile import BadZipFile

import numpy as np

from sslcli.errors import ConfigError, is_disk_failure
from sslcli.runs.embedding import EmbeddedBatch
from sslcli.system import atomic, locks
from sslcli.system.stored import DamagedFile, read_json

PART = re.compile(r"part-(\d{12})-(\d{12})\.npz")
MAX_BYTES = 1 << 26  # a part is written when its features have this size, so that memory stays constant,
MAX_SECONDS = 30.0  # or after this time, so that little work is lost


class Identity(TypedDict):
    """Content of the file that identifies the features in the part files."""

    identity: str


class Parts:
    """Folder of part files. Use it in a `with` block. When the block ends, batches in memory are written.

    A part file is written atomically and contains whole batches. Its name contains the numbers of its first image and
    of the first image after it.

    Args:
        folder: the folder; created if it does not exist. If its part files have another identity, they are removed.
        identity: digest of everything on which the features depend.

    Attributes:
        done: number of images in part files and in memory.
        num_features: number of features per image; 0 before the first batch.
        rows: number of readable images in part files.
        unreadable: path -> reason, of the unreadable images in part files.
        removed: number of part files with another identity, which were removed.

    Raises ConfigError if another process writes into the folder.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            if is_disk_failure(error):
                raise
            raise ConfigError(f"{folder} cannot be created ({error.strerror}): set out to another file") from error
        lock = locks.lock(folder / ".lock")
        if lock is None:
            raise ConfigError(f"another process writes {folder}: wait until it ends, or set out to another file")
        self.lock: IO[str] = lock
        self.removed = self.remove_others(identity)
        self.paths: list[Path] = []
        self.done = self.num_features = self.rows = 0
        self.unreadable: dict[str, str] = {}
        self.pending: list[EmbeddedBatch] = []
        self.written = time.monotonic()
        for path in sorted(folder.glob("part-*.npz")):
            self.resume(path)

    def remove_others(self, identity: str) -> int:
        """Remove the part files unless they have the identity, store the identity, and return the number of files."""
        path = self.folder / "identity.json"
        try:
            stored = read_json(path, Identity, remedy="remove it")["identity"]
        except (FileNotFoundError, DamagedFile):
            stored = ""
        if stored == identity:
            return 0
        others = list(self.folder.glob("part-*.npz"))
        for part in others:
            part.unlink()
        atomic.replace(path, json.dumps({"identity": identity}).encode())
        return len(others)

    def resume(self, path: Path) -> None:
        """Use a part file of an earlier process. Remove it if it is damaged, or if a part before it is missing."""
        match = PART.fullmatch(path.name)
        try:
            if match is None or int(match[1]) != self.done:
                raise ValueError("a part before this one is missing")
            batch = read_part(path)
        except (ValueError, KeyError, OSError, EOFError, BadZipFile):
            path.unlink()
            return
        self.include(path, batch)
        self.done += batch.images

    def include(self, path: Path, batch: EmbeddedBatch) -> None:
        """Count the images of a part file."""
        self.paths.append(path)
        self.rows += len(batch.positions)
        self.num_features = batch.features.shape[1]
        self.unreadable |= batch.unreadable

    def add(self, batch: EmbeddedBatch) -> None:
        """Add a batch in memory. Write a part file if the batches in memory are large or old."""
        self.pending.append(batch)
        self.done += batch.images
        size = sum(each.features.nbytes for each in self.pending)
        if size >= MAX_BYTES or time.monotonic() - self.written >= MAX_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the batches in memory to a part file."""
        if not self.pending:
            return
        batch = EmbeddedBatch(
            images=sum(each.images for each in self.pending),
            positions=np.concatenate([each.positions for each in self.pending]),
            features=np.concatenate([each.features for each in self.pending]),
            unreadable={path: why for each in self.pending for path, why in each.unreadable.items()},
        )
        path = self.folder / f"part-{self.done - batch.images:012d}-{self.done:012d}.npz"
        atomic.write(path, partial(write_part, batch))
        self.pending, self.written = [], time.monotonic()
        self.include(path, batch)

    def __iter__(self) -> Iterator[EmbeddedBatch]:
        """Read the part files one after another, as one batch each."""
        return map(read_part, self.paths)

    def remove(self) -> None:
        """Remove the folder."""
        atomic.discard(self.folder)

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.folder.exists():
                self.flush()
        finally:
            self.lock.close()


def write_part(batch: EmbeddedBatch, path: Path) -> None:
    """Write a batch to a file."""
    unreadable = np.frombuffer(json.dumps([batch.images, batch.unreadable]).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, positions=batch.positions, features=batch.features, unreadable=unreadable)


def read_part(path: Path) -> EmbeddedBatch:
    """Read the batch that `write_part` wrote. Damaged files cause various errors; checksums are verified."""
    with np.load(path, allow_pickle=False) as stored:
        images, unreadable = json.loads(stored["unreadable"].tobytes())
        return EmbeddedBatch(images, stored["positions"], stored["features"], unreadable)
