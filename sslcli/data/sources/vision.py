"""Read the sets that torchvision knows into arrays, or say exactly what is missing and where it belongs."""

from __future__ import annotations

import os
import socket
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TIMEOUT = 20.0  # seconds without a byte before a download is given up

# Images without and with the unlabeled ones, side in pixels.
_SIZES = {
    "CIFAR10": (60_000, 60_000, 32),
    "CIFAR100": (60_000, 60_000, 32),
    "STL10": (13_000, 113_000, 96),
    "SVHN": (99_289, 99_289, 32),
}


@dataclass(frozen=True)
class Parts:
    """Training pool first, test last."""

    pixels: list[NDArray[np.uint8]]  # each (n, 3, S, S)
    labels: list[NDArray[np.int64]]  # each (n,), -1 = unknown
    classes: list[str]
    num_test: int


def read_parts(name: str, root: str | os.PathLike[str], *, download: bool, unlabeled: bool, memory_gb: float) -> Parts:
    """Read a set, fetching it first if `download` and files are absent. See `sources.TorchvisionSet`.

    Raises ValueError for an unknown name, too little memory, absent files that cannot be fetched, and damaged files.
    """
    if name not in _SIZES:
        raise ValueError(f"dataset.name is {name!r}, but it must be one of: {', '.join(_SIZES)}")
    if unlabeled and name != "STL10":
        raise ValueError(f"dataset.unlabeled is true, but {name} has no unlabeled images: set it to false")
    needed = _SIZES[name][unlabeled] * 3 * _SIZES[name][2] ** 2 / 1e9
    if needed > memory_gb:
        less = ", or set dataset.unlabeled=false" if unlabeled else ""
        raise ValueError(
            f"{name} takes {needed:.1f} GB as one tensor (twice that while it is read), but dataset.memory_gb is "
            f"{memory_gb:g}: raise it if the memory is there{less}"
        )
    if name == "SVHN" and find_spec("scipy") is None:
        raise ValueError("SVHN comes in MATLAB files, which scipy reads: pip install scipy")
    from torchvision import datasets

    folder, kind = Path(root).expanduser(), getattr(datasets, name)
    files = _files(kind, folder)
    if not all(path.is_file() for path in files):
        _fetch(kind, folder, files, download=download)
    names = ["train", *(["unlabeled"] if unlabeled else []), "test"]
    try:
        sets = [_build(kind, folder, part) for part in names]
    # Unpickling a damaged file may raise nearly anything.
    except Exception as error:
        raise ValueError(
            f"{name} in {folder.absolute()} cannot be read ({error}): the files are damaged or not the official ones; "
            f"delete {', '.join(str(path.relative_to(folder)) for path in files[:3])} ... and fetch them again"
        ) from error
    pixels = [part.data.transpose(0, 3, 1, 2) if name.startswith("CIFAR") else part.data for part in sets]
    labels = [np.asarray(part.targets if name.startswith("CIFAR") else part.labels, np.int64) for part in sets]
    classes = list(getattr(sets[0], "classes", map(str, range(10))))
    return Parts(pixels, labels, classes, len(labels[-1]))


def _build(kind: Any, root: Path, part: str, **options: bool) -> Any:
    if kind.__name__.startswith("CIFAR"):
        return kind(root, train=part == "train", **options)
    return kind(root, split=part, **options)


def _files(kind: Any, root: Path) -> list[Path]:
    """The files of the set, which must all be there."""
    if kind.__name__ == "SVHN":
        return [root / kind.split_list[part][1] for part in ("train", "test")]
    names = [name for name, _ in kind.train_list + kind.test_list]
    if hasattr(kind, "meta"):
        names.append(kind.meta["filename"])
    return [root / kind.base_folder / name for name in names]


def _fetch(kind: Any, root: Path, files: list[Path], *, download: bool) -> None:
    """Download what is absent, or raise ValueError with what must lie where."""
    reason = "dataset.download is false"
    if download:
        try:
            with alone(root), _timeout(_TIMEOUT):
                # Another process may have been first.
                if not all(path.is_file() for path in files):
                    for part in ("train", "test"):
                        _build(kind, root, part, download=True)
            return
        except (OSError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as error:
            reason = f"the download failed: {error}"
    absent = [str(path.relative_to(root)) for path in files if not path.is_file()]
    urls = [kind.split_list[part][0] for part in ("train", "test")] if hasattr(kind, "split_list") else [kind.url]
    raise ValueError(
        f"{kind.__name__} is not in {root.absolute()} ({reason}). That folder (dataset.root) must hold "
        f"{', '.join(absent)}: fetch {' and '.join(urls)} where there is a network and unpack it there, "
        "point dataset.root at a folder that has it, or use dataset=shapes, which needs no files"
    )


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold a lock, so that the processes of a run or a sweep do not write the same files at once."""
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".download.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """torchvision sets no timeout of its own: behind a firewall that drops packets it would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
