"""Find the files of an image set, and say clearly when there are none."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Mapping, Sequence

EXTENSIONS = frozenset(["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm", "pgm", "gif"])
Root = str | os.PathLike[str] | Sequence[str] | Mapping[str, float]


def parse_roots(root: Root) -> dict[str, float]:
    """Folders, all of them there, and their weights; ValueError for none, a double one or a weight not above 0."""
    if not isinstance(root, (str, os.PathLike, Sequence, Mapping)):
        raise ValueError(f"dataset.root is {root!r}, but it must be a folder, a list of folders, or {{folder: weight}}")
    if isinstance(root, Mapping):
        pairs = list(root.items())
    else:
        pairs = [(str(name), 1.0) for name in ([root] if isinstance(root, (str, os.PathLike)) else root)]
    if not pairs:
        raise ValueError("dataset.root is empty: name at least one folder of images")
    roots: dict[str, float] = {}
    for name, weight in pairs:
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"dataset.root has the weight {weight!r} for {name}, but it must be a number above 0: how often an "
                "epoch shows each image (leave the root out to show none)"
            )
        folder = os.path.expanduser(name)
        check_folder(folder, key="dataset.root")
        if any(os.path.samefile(folder, other) for other in roots):
            raise ValueError(f"dataset.root names {name} twice: name it once, with weight 2 to see it twice an epoch")
        roots[folder] = float(weight)
    return roots


def check_folder(folder: str, *, key: str) -> None:
    """Raise ValueError unless `folder` is a folder."""
    try:
        mode = os.stat(folder).st_mode
    except OSError as error:
        raise ValueError(
            f"{key} is {folder}, but {os.path.abspath(folder)} cannot be opened ({error.strerror}): set {key} to the "
            "folder that holds the images"
        ) from error
    if not stat.S_ISDIR(mode):
        raise ValueError(f"{key} is {folder}, which is a file: set {key} to the folder that holds the images")


def no_images(folder: str) -> str:
    """The message for a folder without images."""
    return f"no images in {folder}: looked for files named *.{', *.'.join(sorted(EXTENSIONS))} (any case) at any depth"


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, without hidden files; ValueError if it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(folder, error) from error


def identity(folder: str) -> tuple[int, int]:
    """What tells a folder from all others, by whatever link it is reached; ValueError if it cannot be entered."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def unreadable(folder: str, error: OSError) -> ValueError:
    """The error for a folder inside a set that cannot be listed."""
    return ValueError(
        f"the folder {folder} cannot be listed ({error.strerror}): give yourself permission to read it, or move it away"
    )


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that leads nowhere or to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image(entry: os.DirEntry[str]) -> bool:
    """Whether the name says so; a broken link counts, so that reading it reports it."""
    stem, _, extension = entry.name.rpartition(".")
    return bool(stem) and extension.lower() in EXTENSIONS and not is_folder(entry)


def scan(folder: str, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> list[str]:
    """Paths below `folder` of the images at any depth, each behind `prefix`; links are followed, loops are not."""
    here = identity(folder)
    if here in above:
        return []
    files: list[str] = []
    for entry in entries(folder):
        if is_image(entry):
            files.append(prefix + entry.name)
        elif is_folder(entry):
            files += scan(entry.path, f"{prefix}{entry.name}/", (*above, here))
    return files


def scan_classes(root: str) -> dict[str, list[str]]:
    """Files of each class folder of `root`, as paths below `root`; ValueError if there are none."""
    found = entries(root)
    groups = {e.name: scan(e.path, f"{e.name}/") for e in found if is_folder(e)}
    loose = sum(map(is_image, found))
    if loose and not groups:
        raise ValueError(f"{root} holds {loose} images but no class folders: use dataset=flat for unlabeled images")
    if not any(groups.values()):
        raise ValueError(no_images(root))
    empty = [name for name, files in groups.items() if not files]
    if empty:
        warnings.warn(f"class folders without images left out of {root}: {', '.join(empty)}", stacklevel=2)
    if loose:
        warnings.warn(f"{loose} images beside the class folders of {root} are ignored", stacklevel=2)
    return {name: files for name, files in groups.items() if files}
