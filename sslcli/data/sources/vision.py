"""Reader of torchvision's datasets. It can download missing files."""

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

_TIMEOUT = 20.0  # seconds without data before a download fails

# Per dataset: number of labeled images, number of all images including unlabeled ones, and side in pixels.
_SIZES = {
    "CIFAR10": (60_000, 60_000, 32),
    "CIFAR100": (60_000, 60_000, 32),
    "STL10": (13_000, 113_000, 96),
    "SVHN": (99_289, 99_289, 32),
}


@dataclass(frozen=True)
class Parts:
    """Pixels and labels of each part of a dataset, in the order training images, unlabeled images, test images.

    Only STL10 has unlabeled images, and they are optional.
    """

    pixels: list[NDArray[np.uint8]]  # each (n, 3, S, S)
    labels: list[NDArray[np.int64]]  # each (n,), -1 = unknown
    classes: list[str]
    num_test: int  # number of images of the test split


def read_parts(name: str, root: str | os.PathLike[str], *, download: bool, unlabeled: bool, memory_gb: float) -> Parts:
    """Read a dataset of torchvision. If files are missing and `download` is True, download it first.

    name: "CIFAR10", "CIFAR100", "STL10" or "SVHN".
    root: the folder of the files.
    unlabeled: whether to read the unlabeled images of STL10.
    memory_gb: the largest allowed size of the pixels in GB (10**9 bytes).

    Raises ValueError if the name is unknown, the images exceed `memory_gb`, files are missing and cannot be downloaded,
    or files are damaged.
    """
    if name not in _SIZES:
        raise ValueError(f"dataset.name is {name!r}, but it must be one of: {', '.join(_SIZES)}")
    if unlabeled and name != "STL10":
        raise ValueError(f"dataset.unlabeled is true, but {name} has no unlabeled images: set it to false")
    needed = _SIZES[name][unlabeled] * 3 * _SIZES[name][2] ** 2 / 1e9
    if needed > memory_gb:
        alternative = ", or set dataset.unlabeled=false" if unlabeled else ""
        raise ValueError(
            f"{name} takes {needed:.1f} GB as one tensor (twice that while it is read), but dataset.memory_gb is "
            f"{memory_gb:g}: increase dataset.memory_gb if the machine has the memory{alternative}"
        )
    if name == "SVHN" and find_spec("scipy") is None:
        raise ValueError("SVHN is stored in MATLAB files, which need the package scipy: pip install scipy")
    from torchvision import datasets

    folder, kind = Path(root).expanduser(), getattr(datasets, name)
    files = _files(kind, folder)
    if not all(path.is_file() for path in files):
        _download_missing(kind, folder, files, download=download)
    names = ["train", *(["unlabeled"] if unlabeled else []), "test"]
    try:
        sets = [_build(kind, folder, part) for part in names]
    # Unpickling a damaged file may raise nearly any exception type.
    except Exception as error:
        raise ValueError(
            f"{name} in {folder.absolute()} cannot be read ({error}): the files are damaged or not the official ones; "
            f"delete {', '.join(str(path.relative_to(folder)) for path in files[:3])} ... and download them again"
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
    """Return the paths of the files that a dataset needs.

    kind: torchvision's class of the dataset.
    root: the folder of the files.
    """
    if kind.__name__ == "SVHN":
        return [root / kind.split_list[part][1] for part in ("train", "test")]
    names = [name for name, _ in kind.train_list + kind.test_list]
    if hasattr(kind, "meta"):
        names.append(kind.meta["filename"])
    return [root / kind.base_folder / name for name in names]


def _download_missing(kind: Any, root: Path, files: list[Path], *, download: bool) -> None:
    """Download a dataset if files are missing. See `_files` for `kind` and `root`.

    Raises ValueError if the download fails or is disabled. The message names the folder and the missing files.
    """
    reason = "dataset.download is false"
    if download:
        try:
            with exclusive_lock(root), _timeout(_TIMEOUT):
                # Another process may have downloaded the files while this process waited for the lock.
                if not all(path.is_file() for path in files):
                    for part in ("train", "test"):
                        _build(kind, root, part, download=True)
            return
        except (OSError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as error:
            reason = f"the download failed: {error}"
    missing = [str(path.relative_to(root)) for path in files if not path.is_file()]
    urls = [kind.split_list[part][0] for part in ("train", "test")] if hasattr(kind, "split_list") else [kind.url]
    raise ValueError(
        f"{kind.__name__} is not in {root.absolute()} ({reason}). That folder (dataset.root) must contain "
        f"{', '.join(missing)}: download {' and '.join(urls)} on a machine with a network and unpack it there, "
        "set dataset.root to a folder that has these files, or use dataset=shapes, which needs no files"
    )


@contextmanager
def exclusive_lock(root: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder within the block.

    If another process holds the lock, wait until it releases the lock.
    """
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".download.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Set the default socket timeout within the block.

    torchvision sets no timeout. Without a timeout, a download would hang behind a firewall that drops packets.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
