"""Discovery of image files in folders."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Mapping, Sequence

from sslcli.errors import printable

EXTENSIONS = frozenset(["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm", "pgm", "gif"])
Root = str | os.PathLike[str] | Sequence[str] | Mapping[str, float]


def parse_roots(root: Root) -> dict[str, float]:
    """Return a mapping from each root folder to its weight.

    Raises ValueError if `root` contains no folder, a folder is missing or occurs twice, or a weight is not above 0.
    """
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
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"dataset.root has the weight {weight!r} for {name}, but it must be a number above 0, how often an "
                "epoch shows each image: correct it, or remove the root to show none of its images"
            )
        folder = os.path.expanduser(name)
        check_folder(folder, key="dataset.root")
        if any(os.path.samefile(folder, other) for other in roots):
            raise ValueError(
                f"dataset.root has {name} twice: keep one, with weight 2 to show its images twice per epoch"
            )
        roots[folder] = float(weight)
    return roots


def check_folder(folder: str, *, key: str) -> None:
    """Raise ValueError unless `folder` is a folder. `key` is the configuration key, for the message."""
    try:
        mode = os.stat(folder).st_mode
    except OSError as error:
        raise ValueError(
            f"{key} is {folder}, but {os.path.abspath(folder)} cannot be opened ({error.strerror}): set {key} to the "
            "folder of the images"
        ) from error
    if not stat.S_ISDIR(mode):
        raise ValueError(f"{key} is {folder}, which is a file: set {key} to the folder of the images")


def no_images(folder: str) -> str:
    """Return the message for a folder without images."""
    patterns = ", *.".join(sorted(EXTENSIONS))
    return f"there are no images in {folder}: it needs files named *.{patterns} (any case), at any depth"


def list_entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name, without hidden entries.

    Raises ValueError if the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise listing_error(folder, error) from error


def folder_identity(folder: str) -> tuple[int, int]:
    """Return the device and inode of a folder. They identify the folder even if its path contains links.

    Raises ValueError if `stat` fails.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        raise listing_error(folder, error) from error
    return status.st_dev, status.st_ino


def listing_error(folder: str, error: OSError) -> ValueError:
    """Return the error for a folder inside a dataset that cannot be listed."""
    return ValueError(
        f"the folder {folder} cannot be listed ({error.strerror}): give yourself permission to read it, or move it"
    )


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether `entry` is a folder or a link to a folder. Return False for a broken link or a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image(entry: os.DirEntry[str]) -> bool:
    """Return whether `entry` has the extension of an image file and is not a folder.

    A broken link with the extension of an image counts as an image, so that it is later reported as a bad image.
    """
    stem, _, extension = entry.name.rpartition(".")
    return bool(stem) and extension.lower() in EXTENSIONS and not is_folder(entry)


def scan(folder: str, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> list[str]:
    """Return the paths of the images at any depth below `folder`.

    A path is `prefix` plus the path relative to `folder`.

    Links are followed, unless a link leads back to a parent folder. `above` contains the identities of the parent
    folders.
    """
    current = folder_identity(folder)
    if current in above:
        return []
    files: list[str] = []
    for entry in list_entries(folder):
        if is_image(entry):
            files.append(prefix + entry.name)
        elif is_folder(entry):
            files += scan(entry.path, f"{prefix}{entry.name}/", (*above, current))
    return files


def scan_classes(root: str) -> dict[str, list[str]]:
    """Return the files of each class folder of `root`, as paths relative to `root`.

    Raises ValueError if there are no class folders with images.
    """
    found = list_entries(root)
    groups = {e.name: scan(e.path, f"{e.name}/") for e in found if is_folder(e)}
    loose = sum(map(is_image, found))
    if loose and not groups:
        raise ValueError(f"{root} has {loose} images but no class folders: use dataset=flat for unlabeled images")
    if not any(groups.values()):
        raise ValueError(no_images(root))
    empty = [name for name, files in groups.items() if not files]
    if empty:
        warnings.warn(
            f"these class folders of {root} have no images and are skipped: {printable(', '.join(empty))}", stacklevel=2
        )
    if loose:
        warnings.warn(f"{loose} images outside of the class folders of {root} are ignored", stacklevel=2)
    return {name: files for name, files in groups.items() if files}
