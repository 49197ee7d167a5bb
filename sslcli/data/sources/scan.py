"""Discovery of image files in folders."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from sslcli.data.image_formats import START_BYTES, describe_left_out, extension_of, is_image_start, listed_extensions
from sslcli.errors import printable
from sslcli.system.regular_files import open_regular

LinkedFolders = Literal["once", "always"]
Root = str | os.PathLike[str] | Sequence[str] | Mapping[str, float]


def parse_roots(root: Root) -> dict[str, float]:
    """Return a mapping from each root folder to its weight.

    `root` is a folder, a list of folders, or a mapping from folders to weights. Without a mapping, every weight is 1.

    Raises ValueError if `root` names no folder, if a named folder does not exist or is named twice, or if a weight is
    not above 0.
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


def no_images(folder: str, extensions: Iterable[str], left_out: Mapping[str, int]) -> str:
    """Return the message for a folder without images.

    extensions: the extensions of image files.
    left_out: number of files in the folder that are not images, by extension.
    """
    patterns = ", *.".join(sorted(extensions))
    others = f"; the files there are: {printable(describe_left_out(left_out))}" if left_out else ""
    return f"there are no images in {folder}: it needs files named *.{patterns} (any case), at any depth{others}"


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
    """Return the error to raise if a folder of a dataset cannot be listed. `error` is the reason."""
    return ValueError(
        f"the folder {folder} cannot be listed ({error.strerror}): give yourself permission to read it, or move it"
    )


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether `entry` is a folder or a link to a folder. Return False for a broken link or a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


class FileSearch:
    """Search for the image files below one root folder. It counts the files that it leaves out.

    If `extensions` is given, a file is an image if its extension is one of them. If `extensions` is None, two kinds of
    files are images: files with an extension in `image_formats.listed_extensions`, and files without an extension whose
    first bytes are those of an image format. Hidden files and folders are ignored.

    Links are followed. If `linked_folders` is "once", two kinds of links are not followed, because they lead to images
    that are already listed:

    - links to a folder inside of `root`, because the images of that folder are listed under its own path
    - links to a folder outside of `root`, except the first link to each such folder

    A class folder is a folder in `root` that contains the images of one class. Each class folder is searched
    separately. Therefore, if several class folders link to the same folder outside of `root`, the images of that folder
    are listed once in each of these classes.

    Args:
        root: the root folder.
        extensions: the extensions of image files, see `parse_extensions`; None = all image files.
        linked_folders: "once" or "always". With "always", all links are followed except links to a parent folder.

    Attributes:
        left_out: the number of files that are not listed as images, by extension.
        links: paths of the links that were not followed, relative to `root`.
    """

    def __init__(
        self, root: str, extensions: frozenset[str] | None = None, linked_folders: LinkedFolders = "once"
    ) -> None:
        if linked_folders not in get_args(LinkedFolders):
            raise ValueError(f"dataset.linked_folders is {linked_folders!r}, but it must be once or always")
        self.lists_once = linked_folders == "once"
        self.root, self.real_root = root, os.path.realpath(root)
        self.checks_content = extensions is None
        self.extensions = listed_extensions() if extensions is None else extensions
        self.left_out: Counter[str] = Counter()
        self.links: list[str] = []

    def classes(self) -> dict[str, list[str]]:
        """Return the images of each class folder as paths relative to `root`. Each folder in `root` is a class folder.

        Warn about files that are left out, class folders without images, and links that are not followed.

        Raises ValueError if there are no class folders with images.
        """
        found = list_entries(self.root)
        groups: dict[str, list[str]] = {}
        for entry in filter(is_folder, found):
            if self.is_duplicate(entry):
                self.links.append(entry.name)
            else:
                groups[entry.name] = self.files_below(entry.path, f"{entry.name}/")
        loose = sum(map(self.is_image, found))
        if loose and not groups:
            raise ValueError(
                f"{self.root} has {loose} images but no class folders: use dataset=flat for unlabeled images"
            )
        if not any(groups.values()):
            raise ValueError(no_images(self.root, self.extensions, self.left_out))
        empty = [name for name, files in groups.items() if not files]
        if empty:
            warnings.warn(
                f"these class folders of {self.root} have no images and are skipped: {printable(', '.join(empty))}",
                stacklevel=2,
            )
        if loose:
            warnings.warn(f"{loose} images outside of the class folders of {self.root} are ignored", stacklevel=2)
        self.warn()
        return {name: files for name, files in groups.items() if files}

    def files(self) -> list[str]:
        """Return all images below `root`, as paths relative to `root`.

        Warn about files that are left out and links that are not followed.

        Raises ValueError if there are no images.
        """
        files = self.files_below(self.root)
        if not files:
            raise ValueError(no_images(self.root, self.extensions, self.left_out))
        self.warn()
        return files

    def files_below(self, folder: str, prefix: str = "") -> list[str]:
        """Return the images at any depth below `folder`. Each path is `prefix` plus the path relative to `folder`."""
        # A link to a parent of `root` must not lead to `root` again.
        listed = {folder_identity(self.root)} if self.lists_once and folder != self.root else set()
        files: list[str] = []
        self._add_files(folder, prefix, files, listed)
        return files

    def _add_files(self, folder: str, prefix: str, files: list[str], listed: set[tuple[int, int]]) -> None:
        """Append the images below `folder` to `files`.

        prefix: prefix of the appended paths, see `files_below`.
        listed: identities (see `folder_identity`) of the folders whose images are already in `files`.
        """
        current = folder_identity(folder)
        if current in listed:
            self.links.append(prefix.rstrip("/"))
            return
        # With linked_folders="always", each call changes its own copy, which contains only `folder` and its parents.
        listed = listed if self.lists_once else set(listed)
        listed.add(current)
        for entry in list_entries(folder):
            if self.is_image(entry):
                files.append(prefix + entry.name)
            elif is_folder(entry):
                if self.is_duplicate(entry):
                    self.links.append(prefix + entry.name)
                else:
                    self._add_files(entry.path, f"{prefix}{entry.name}/", files, listed)

    def is_image(self, entry: os.DirEntry[str]) -> bool:
        """Return whether `entry` is an image file. If it is another file, count it in `left_out`.

        A broken link with the extension of an image counts as an image, so that it is later reported as a bad image.
        """
        if is_folder(entry):
            return False
        extension = extension_of(entry.name)
        if not extension and self.checks_content:
            is_image = has_image_content(entry.path)
        else:
            is_image = extension in self.extensions
        if not is_image:
            self.left_out[extension] += 1
        return is_image

    def is_duplicate(self, entry: os.DirEntry[str]) -> bool:
        """Return whether `entry` is a link that must not be followed, because it leads to a folder inside of `root`.

        The images of that folder are listed under its own path. With linked_folders="always", return False. This
        function does not check links to folders outside of `root`.
        """
        if not (self.lists_once and entry.is_symlink()):
            return False
        relative = os.path.relpath(os.path.realpath(entry.path), self.real_root)
        parts = [] if relative == os.curdir else relative.split(os.sep)
        return not any(part.startswith(".") for part in parts)  # a part is ".." outside of `root`

    def warn(self) -> None:
        """Warn about files that are left out and about links that are not followed."""
        if self.left_out:
            warnings.warn(
                f"files in {self.root} that are left out, because they are not images or dataset.extensions excludes "
                f"them: {printable(describe_left_out(self.left_out))}",
                stacklevel=3,
            )
        if self.links:
            shown = ", ".join(self.links[:3]) + (f", ... ({len(self.links)} links)" if len(self.links) > 3 else "")
            warnings.warn(
                f"links in {self.root} that are not followed, because the images there are listed already: "
                f"{printable(shown)}",
                stacklevel=3,
            )


def has_image_content(path: str) -> bool:
    """Return whether the first bytes of a regular file are those of an image format.

    Return False if the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            return is_image_start(file.read(START_BYTES))
    except OSError:
        return False
