"""List of the files of a dataset, and the base class of all datasets of files.

A root is a folder that contains the images of a dataset. A file is identified by its path relative to its root.
Therefore the split and the fingerprint do not change if a root is moved.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from sslcli.data.image_formats import size_of
from sslcli.data.sources.base import Source
from sslcli.data.sources.file_status import hashes_of, status_of
from sslcli.data.sources.records import ProgressCallback, Records, digest, label_codes, make_records
from sslcli.system.regular_files import open_regular


@dataclass
class Listing:
    """List of the files of a dataset, in position order."""

    names: list[str] = field(default_factory=list)  # path of each file relative to its root, with "/"
    labels: list[int] = field(default_factory=list)  # label of each file; -1 = unknown
    roots: list[int] = field(default_factory=list)  # number of the root of each file

    def add(self, names: Sequence[str], *, label: int, root: int) -> None:
        """Append files with the same label and the same root."""
        self.names += names
        self.labels += [label] * len(names)
        self.roots += [root] * len(names)

    def sort(self) -> None:
        """Sort the files by name. Sort files with the same name by root."""
        order = sorted(range(len(self.names)), key=lambda i: (self.names[i], self.roots[i]))
        self.names = [self.names[i] for i in order]
        self.labels = [self.labels[i] for i in order]
        self.roots = [self.roots[i] for i in order]


class Files(Source):
    """Base class of datasets of files. File names are stored in arrays, which workers share without copies."""

    _status: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    _hashes: NDArray[np.uint64] | None = None

    def fill(
        self,
        pool: Listing,
        test: Listing,
        *,
        name: str,
        roots: Sequence[str],
        classes: list[str],
        weights: Sequence[float] = (),
        held_out: Sequence[bool] | None = None,
    ) -> None:
        """Set the files and the splits of the dataset.

        Args:
            pool: the files that are split into train and val.
            test: the files of the official test split; may be empty.
            name: name of the dataset.
            roots: the root folders. The root numbers in `pool` and `test` are indices into this list.
            classes: the class names.
            weights: number of times that each image of a root occurs in an epoch, one value per root. Empty = once.
            held_out: whether each file of `pool` is held out for validation; None = `val_fraction` decides.
        """
        names = [os.fsencode(file) for file in pool.names + test.names]
        self.name, self.classes, self.roots = name, classes, list(roots)
        self.labels = torch.tensor(pool.labels + test.labels, dtype=torch.int64)
        self._names = b"".join(names)
        self._ends = np.fromiter(accumulate(map(len, names)), np.int64, len(names))
        self._root_of = np.array(pool.roots + test.roots, np.int64)
        hashes = b"".join(hashlib.blake2b(file, digest_size=8).digest() for file in names[: len(pool.names)])
        keys = torch.from_numpy(np.frombuffer(hashes, "<i8").astype(np.int64))
        mask = None if held_out is None else torch.tensor(held_out)
        self.split(keys, labeled=self.labels[: len(keys)] >= 0, num_test=len(test.names), held_out=mask)
        if any(weight != 1 for weight in weights):
            self.weights = torch.tensor(weights)[torch.from_numpy(self._root_of)[self.splits["train"]]]

    def relative(self, position: int) -> str:
        """Return the path of the file at `position`, relative to its root."""
        start = self._ends[position - 1] if position else 0
        return os.fsdecode(self._names[start : self._ends[position]])

    def path(self, position: int) -> str:
        """Return the path of the file at `position`."""
        return os.path.join(self.roots[self._root_of[position]], self.relative(position))

    def stored_size(self, position: int) -> tuple[int, int] | None:
        """Return width and height in pixels of the image at `position`, or None if its header cannot be read."""
        try:
            with open_regular(self.path(position)) as file:
                return size_of(file)
        except OSError:
            return None

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the dataset in 16 hex digits.

        The digits are the start of a sha256. The hash includes the relative path, the size in bytes (-1 = unknown) and
        the label of every file. It needs one `stat` call per file. A million files therefore take a while.
        """
        return digest(self._rows())

    def _rows(self) -> Iterator[bytes]:
        sizes, _ = self.status()
        for position, (size, label) in enumerate(zip(sizes.tolist(), self.labels.tolist(), strict=True)):
            yield os.fsencode(self.relative(position)) + f"\0{size}\0{label}".encode()

    def status(self, on_progress: ProgressCallback | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sizes in bytes and the modification times in nanoseconds of all files. The result is cached.

        on_progress: callback that is called with the number of files done and the number of all files.
        """
        if self._status is None:
            self._status = status_of(self.num_files, self.file, on_progress)
        return self._status

    @property
    def num_files(self) -> int:
        """Number of files."""
        return len(self)

    def file(self, number: int) -> str:
        """Return the path of file `number`. Files have the same order as the images of the dataset."""
        return self.path(number)

    def file_names(self) -> Iterator[bytes]:
        """Yield the path of every file relative to its root.

        With several roots, the root number precedes the path.
        """
        for position, root in enumerate(self._root_of.tolist()):
            name = os.fsencode(self.relative(position))
            yield name if len(self.roots) == 1 else b"%d:%b" % (root, name)

    def file_labels(self) -> NDArray[np.int64]:
        """Return a hash of the class name of every file; 0 = no label."""
        return label_codes(self.labels, self.classes)

    def records(self, *, contents: bool = False, on_progress: ProgressCallback | None = None) -> Records:
        """Return one record per file, with which a resumed run detects changed files.

        contents: whether to hash the contents of the files.
        on_progress: callback that reports the progress of long calls.
        """
        sizes, stamps = self.status(on_progress)
        if contents and self._hashes is None:
            self._hashes = hashes_of(self.num_files, self.file, on_progress)
        hashes = self._hashes if contents else None
        return make_records(self.file_names(), self.file_labels(), sizes=sizes, stamps=stamps, contents=hashes)
