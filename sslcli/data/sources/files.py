"""Datasets of image files: class folders, ImageNet, flat folders and CSV lists.

A root is a folder that contains the images of a dataset. A file is identified by its path relative to its root.
Therefore the split and the fingerprint do not change if a root is moved.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sslcli.data.decode import open_file
from sslcli.data.decoded_cache import DecodedCache, cache_folder, check_cache_options
from sslcli.data.image_formats import parse_extensions
from sslcli.data.sources.base import OpenedImage, Source, check_flag
from sslcli.data.sources.csv_list import read_csv
from sslcli.data.sources.file_status import hashes_of, status_of
from sslcli.data.sources.labels import Labels, as_labels
from sslcli.data.sources.leaks import check_class_names, check_disjoint, check_shared_files
from sslcli.data.sources.records import ProgressCallback, Records, digest, label_codes, make_records
from sslcli.data.sources.scan import FileSearch, Root, check_folder, parse_roots

LABEL_COLUMN = "correct it, or rename the column to use the images without labels"


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
    ) -> None:
        """Set the files and the splits of the dataset.

        Args:
            pool: the files that are split into train and val.
            test: the files of the official test split; may be empty.
            name: name of the dataset.
            roots: the root folders. `pool` and `test` contain the numbers of the roots.
            classes: the class names.
            weights: the weight of the images of each root. Empty = all weights are 1.
        """
        names = [os.fsencode(file) for file in pool.names + test.names]
        self.name, self.classes, self.roots = name, classes, list(roots)
        self.labels = torch.tensor(pool.labels + test.labels, dtype=torch.int64)
        self._names = b"".join(names)
        self._ends = np.fromiter(accumulate(map(len, names)), np.int64, len(names))
        self._root_of = np.array(pool.roots + test.roots, np.int64)
        hashes = b"".join(hashlib.blake2b(file, digest_size=8).digest() for file in names[: len(pool.names)])
        keys = torch.from_numpy(np.frombuffer(hashes, "<i8").astype(np.int64))
        self.split(keys, labeled=self.labels[: len(keys)] >= 0, num_test=len(test.names))
        if any(weight != 1 for weight in weights):
            self.weights = torch.tensor(weights)[torch.from_numpy(self._root_of)[self.splits["train"]]]

    def relative(self, position: int) -> str:
        """Return the path of the file at `position`, relative to its root."""
        start = self._ends[position - 1] if position else 0
        return os.fsdecode(self._names[start : self._ends[position]])

    def path(self, position: int) -> str:
        """Return the path of the file at `position`."""
        return os.path.join(self.roots[self._root_of[position]], self.relative(position))

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the dataset in 16 hex digits.

        The fingerprint is the sha256 of the relative path, the size in bytes (-1 = unknown) and the label of every
        file. One `stat` call per file is needed, which takes a while for a million files.
        """
        return digest(self._rows())

    def _rows(self) -> Iterator[bytes]:
        sizes, _ = self.status()
        for position, (size, label) in enumerate(zip(sizes.tolist(), self.labels.tolist(), strict=True)):
            yield os.fsencode(self.relative(position)) + f"\0{size}\0{label}".encode()

    def status(self, on_progress: ProgressCallback | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sizes and the modification times of all files. The result is cached."""
        if self._status is None:
            self._status = status_of(self.num_files, self.file, on_progress)
        return self._status

    @property
    def num_files(self) -> int:
        """Number of files."""
        return len(self)

    def file(self, number: int) -> str:
        """Return the path of file `number`. Files are numbered in the order of the positions."""
        return self.path(number)

    def file_names(self) -> Iterator[bytes]:
        """Yield the path of every file relative to its root.

        With several roots, the root number precedes the path.
        """
        for position, root in enumerate(self._root_of.tolist()):
            name = os.fsencode(self.relative(position))
            yield name if len(self.roots) == 1 else b"%d:%b" % (root, name)

    def file_labels(self) -> NDArray[np.int64]:
        """Return the label code of every file, see `label_codes`."""
        return label_codes(self.labels, self.classes)

    def records(self, *, contents: bool = False, on_progress: ProgressCallback | None = None) -> Records:
        """Return one record per file."""
        sizes, stamps = self.status(on_progress)
        if contents and self._hashes is None:
            self._hashes = hashes_of(self.num_files, self.file, on_progress)
        hashes = self._hashes if contents else None
        return make_records(self.file_names(), self.file_labels(), sizes=sizes, stamps=stamps, contents=hashes)


class ImageFiles(Files):
    """Base class of datasets in which each file is one image.

    Args:
        scaled_decode: see `Source`.
        keep_decoded: cache of decoded full-size images: "ram" = in memory, "disk" = in a file, "none" = no cache. See
            `sslcli.data.decoded_cache`.
        keep_gb: the largest size of the cache in GB (10**9 bytes).
        keep_dir: the folder of the cache file; None = a folder in the user's cache.
        common: the arguments of `Source`.
    """

    decoded_cache: DecodedCache | None = None

    def __init__(
        self,
        *,
        scaled_decode: bool = True,
        keep_decoded: str = "none",
        keep_gb: float = 8.0,
        keep_dir: str | os.PathLike[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.scaled_decode = check_flag("scaled_decode", scaled_decode)
        check_cache_options(keep_decoded, keep_gb)
        self.keep_decoded, self.keep_gb = keep_decoded, keep_gb
        self.keep_dir = keep_dir

    def fill(self, pool: Listing, test: Listing, **options: Any) -> None:
        """Set the files as `Files.fill` does. Also create the cache of decoded images."""
        super().fill(pool, test, **options)
        if sum(len(part) > 0 for part in self.splits.values()) > 1:
            check_shared_files(self.splits, self.path, roots=self.roots)
        if self.keep_decoded != "none":
            used = torch.cat(list(self.splits.values())).sort().values
            folder = cache_folder(self.keep_dir) if self.keep_decoded == "disk" else None
            self.decoded_cache = DecodedCache(self.path, used, folder=folder, name=self.name, gigabytes=self.keep_gb)

    def open(self, position: int) -> OpenedImage:
        """Open the image at `position`."""
        return open_file(self.path(position)) if self.decoded_cache is None else self.decoded_cache.open(position)


class Folder(ImageFiles):
    """Dataset of class folders, `root/<class>/**/<image>`. The label of an image is the name of its class folder.

    Args:
        root: a folder, a list of folders, or a mapping from folder to weight. With weight 2.0, an epoch contains each
            training image of the folder twice. With weight 0.5, an epoch contains half of the training images of the
            folder. The classes of several roots are merged by name.
        test: the folder of the official test split, which contains class folders; None = no test split.
        extensions: extensions of the files to read, such as ["jpg", "png"]; None = all image files, see `FileSearch`.
        common: the arguments of `ImageFiles`.

    Class folders without images, images outside of class folders, and other files are ignored with a warning.

    Raises ValueError if a root is missing, is not a folder, cannot be read, or has no images in class folders. Raises
    ConfigError if the same image would be in two splits, or if all class folders are named as splits, see `leaks`.
    """

    def __init__(
        self,
        *,
        root: Root,
        test: str | os.PathLike[str] | None = None,
        extensions: Sequence[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        allowed = parse_extensions(extensions)
        roots = parse_roots(root)
        check_disjoint(roots, None if test is None else os.path.expanduser(test))
        found = [FileSearch(folder, allowed).classes() for folder in roots]
        for folder, groups in zip(roots, found, strict=True):
            check_class_names(groups, folder)
        classes = sorted(set().union(*found))
        label = {name: number for number, name in enumerate(classes)}
        pool, test_files = Listing(), Listing()
        for number, groups in enumerate(found):
            for name, files in groups.items():
                pool.add(files, label=label[name], root=number)
        if test is not None:
            test = os.path.expanduser(test)
            check_folder(test, key="dataset.test")
            for name, files in FileSearch(test, allowed).classes().items():
                if name not in label:
                    raise ValueError(
                        f"{test} has the class folder {name!r}, which {', '.join(roots)} does not have: remove it"
                    )
                test_files.add(files, label=label[name], root=len(roots))
        pool.sort()
        test_files.sort()
        all_roots = [*roots, *([] if test is None else [test])]
        weights = [*roots.values(), 1.0]
        self.fill(pool, test_files, name=base_name(roots), roots=all_roots, classes=classes, weights=weights)


class ImageNet(Folder):
    """ImageNet-1k as class folders, `root/train/<wnid>/` and `root/val/<wnid>/`.

    `val`, the official validation set, is used as the test split.

    Args:
        root: the folder that contains `train` and `val`.
        common: the arguments of `ImageFiles`.

    Raises ValueError if `train` or `val` is missing. torchvision cannot download ImageNet.
    """

    def __init__(self, *, root: str | os.PathLike[str], **common: Any) -> None:
        root = os.path.expanduser(root)
        train, val = os.path.join(root, "train"), os.path.join(root, "val")
        for folder in (train, val):
            if not os.path.isdir(folder):
                raise ValueError(
                    f"there is no folder {os.path.abspath(folder)}: dataset.root must contain train/ and val/, each "
                    "with one folder per class (n01440764, ...). Download the archives from image-net.org and unpack "
                    "them there, or use dataset=folder for class folders in another layout"
                )
        super().__init__(root=train, test=val, **common)
        self.name = "imagenet"


class Flat(ImageFiles):
    """Unlabeled images at any depth below one or several roots. No images are held out for validation.

    Args:
        root, extensions: as for `Folder`.
        common: the arguments of `ImageFiles`.

    Raises ValueError in the same cases as `Folder`.
    """

    def __init__(self, *, root: Root, extensions: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        allowed = parse_extensions(extensions)
        roots = parse_roots(root)
        check_disjoint(roots)
        pool = Listing()
        for number, folder in enumerate(roots):
            pool.add(FileSearch(folder, allowed).files(), label=-1, root=number)
        pool.sort()
        weights = list(roots.values())
        self.fill(pool, Listing(), name=base_name(roots), roots=list(roots), classes=[], weights=weights)


class ListFile(ImageFiles):
    """Images listed in a CSV file with a header, a column `path` and optionally a column `label`.

    The labels are text or integers, see `as_labels`. Other columns are ignored.

    Args:
        file: the CSV file, in UTF-8. Position i is row i of the file.
        root: the folder to which the paths are relative; None = the folder of the CSV file.
        common: the arguments of `ImageFiles`.

    Raises ConfigError if the CSV file is missing or invalid, has no column `path`, or has no rows. Raises ValueError if
    `root` is not a folder, or if about 20 of the listed files are checked and none of them exists.
    """

    def __init__(
        self, *, file: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        file = os.path.expanduser(file)
        base = os.path.dirname(os.path.abspath(file)) if root is None else os.path.expanduser(root)
        names, texts = read_csv(file)
        check_folder(base, key="dataset.root")
        sample = names[:: max(1, len(names) // 20)]
        if not any(os.path.lexists(os.path.join(base, name)) for name in sample):
            raise ValueError(
                f"{file} lists {sample[0]!r}, but {os.path.join(base, sample[0])} does not exist, nor does the file of "
                f"any of {len(sample)} rows checked: set dataset.root to the folder that the paths are relative to"
            )
        labels, classes = as_labels([Labels(texts, (), f"the column label of {file}", remedy=LABEL_COLUMN)])
        pool = Listing(names, labels.tolist(), [0] * len(names))
        self.fill(pool, Listing(), name=Path(file).stem, roots=[base], classes=classes)


def base_name(roots: Iterable[str]) -> str:
    """Return the name of the dataset: the last part of each root, joined by "+"."""
    return "+".join(Path(root).absolute().name for root in roots)
