"""Checks that no image is in two splits.

An image can be in two splits if the folders of two splits overlap, if the folders of splits (such as `train` and `val`)
are used as class folders, or if a link in one split leads to an image in another split.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor

from sslcli.errors import ConfigError

MAX_COMPARED = 200_000  # with more files, the comparison would delay the start of a run by seconds
_SPLIT = re.compile(
    r"((?:images?|imgs?|data)[-_ ]?)?"
    r"(?:(?P<train>train|training|trn)|(?P<val>val|valid|validation|dev)|(?P<test>test|testing|eval|evaluation))"
    r"(?:[-_ ]?(?:set|split|data|images?|imgs?|\d+))*",
    re.IGNORECASE,
)


def split_kind(name: str) -> str | None:
    """Return the split that a folder name such as `val2017` stands for: "train", "val", "test" or None."""
    found = _SPLIT.fullmatch(name)
    return None if found is None else found.lastgroup


def check_class_names(classes: Collection[str], root: str) -> None:
    """Raise ConfigError if the class folders in `root` are the folders of splits, such as `train2017` and `val2017`.

    Warn if only some of the class folders have names of splits, among them a name of the training split and a name of
    another split.
    """
    kinds = {name: kind for name in classes if (kind := split_kind(name)) is not None}
    by_kind = {kind: name for name, kind in sorted(kinds.items(), reverse=True)}
    number_of_splits = len(by_kind)
    if not kinds or (number_of_splits < 2 and len(classes) > 1):
        return
    pool = os.path.join(root, by_kind.get("train", min(kinds)))
    others = [by_kind[kind] for kind in ("test", "val") if kind in by_kind and "train" in by_kind]
    test = f"dataset.test={os.path.join(root, others[0])}" if others else "dataset.test to the folder of the test split"
    remedy = f"set dataset.root={pool}, and {test}"
    named = ", ".join(sorted(kinds))
    if len(kinds) == len(classes):
        raise ConfigError(f"the class folders in {root} are {named}, which are names of splits: {remedy}")
    if "train" in by_kind:
        warnings.warn(
            f"the class folders in {root} include {named}, which are names of splits. If these folders contain splits, "
            f"test images are used for training and the labels have no meaning: {remedy}",
            stacklevel=3,
        )


def check_disjoint(roots: Iterable[str], test: str | None = None) -> None:
    """Raise ConfigError if two of the folders in `roots` and `test` are the same, or if one contains another.

    Links are resolved before the folders are compared.
    """
    named = [("dataset.root", root) for root in roots] + ([] if test is None else [("dataset.test", test)])
    for number, (key, folder) in enumerate(named):
        for other_key, other in named[:number]:
            relation = _relation(folder, other)
            if relation is None:
                continue
            effect = (
                "test images would be used for training: set dataset.test to a folder of other images, or to null"
                if key == "dataset.test"
                else "its images would occur twice, in training and in the split val: name only one of them"
            )
            raise ConfigError(f"{key} is {folder}, which {relation} {other_key}={other}, so {effect}")


def _relation(folder: str, other: str) -> str | None:
    one, two = os.path.realpath(folder), os.path.realpath(other)
    if one == two:
        return "is the same folder as"
    if one.startswith(os.path.join(two, "")):
        return "is inside of"
    return "contains" if two.startswith(os.path.join(one, "")) else None


def check_shared_files(splits: Mapping[str, Tensor], path: Callable[[int], str], *, roots: Sequence[str]) -> None:
    """Raise ConfigError if a file of the test split is also in another split.

    Warn if a file is in both the training and the validation split. The files are not read: only their paths are
    compared, after links are resolved. Nothing is compared if there are more than `MAX_COMPARED` files.

    Args:
        splits: the positions of each split.
        path: function that returns the path of the image at a position.
        roots: the root folders, or (). If the root folders contain no links, the comparison is skipped. Pass () if the
            same path may be in two splits even without links, so that paths are always compared.
    """
    if sum(map(len, splits.values())) > MAX_COMPARED:
        return
    paths = {name: [path(position) for position in part.tolist()] for name, part in splits.items()}
    folders = {os.path.dirname(file) for part in paths.values() for file in part}
    real_folders = {folder: os.path.realpath(folder) for folder in folders}
    real_roots = [(root, os.path.realpath(root)) for root in roots]
    links = {file for folder in folders for file in _links_in(folder)}
    if not links and all(_is_direct(folder, real, real_roots) for folder, real in real_folders.items()):
        return

    def real(file: str) -> str:
        if file in links:
            return os.path.realpath(file)
        folder, name = os.path.split(file)
        return os.path.join(real_folders[folder], name)

    owner: dict[str, tuple[str, str]] = {}
    for split in sorted(paths, key=("train", "val", "test").index):
        shared = []
        for file in paths[split]:
            found = owner.setdefault(real(file), (split, file))
            if found[0] != split:
                shared.append((file, *found))
        if not shared:
            continue
        file, other_split, other = shared[0]
        count = f"{len(shared)} of the {len(paths[split])} images of {split} are also in another split"
        example = f"{file} is the same file as {other} in {other_split}"
        remedy = "keep each file in one split only, and remove its other links or list entries"
        if split == "test":
            raise ConfigError(f"{count}: {example}: {remedy}")
        warnings.warn(f"{count}, so their accuracy is too high: {example}: {remedy}", stacklevel=3)


def _links_in(folder: str) -> list[str]:
    """Return the paths of the links directly in a folder."""
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_symlink()]
    except OSError:  # the images there are reported as unreadable
        return []


def _is_direct(folder: str, real: str, roots: Sequence[tuple[str, str]]) -> bool:
    """Return whether `folder` is below a root, and the path between them has no link and no part such as `.`.

    real: the path of `folder` with links resolved.
    roots: a pair for each root: its path, and its path with links resolved.
    """
    for root, real_root in roots:
        if folder == root:
            return True
        if folder.startswith(os.path.join(root, "")):
            relative = folder[len(os.path.join(root, "")) :]
            return relative == os.path.normpath(relative) and real == os.path.join(real_root, relative)
    return False
