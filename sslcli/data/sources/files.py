"""Datasets of image files: class folders, ImageNet, flat folders and CSV lists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sslcli.data.decode import open_file
from sslcli.data.decoded_cache import DecodedCache, cache_folder, check_cache_options
from sslcli.data.image_formats import parse_extensions
from sslcli.data.sources.base import OpenedImage
from sslcli.data.sources.columns import AUTO
from sslcli.data.sources.csv_list import check_files_exist, read_lists
from sslcli.data.sources.encoded import EncodedImages
from sslcli.data.sources.labels import Labels, as_labels
from sslcli.data.sources.leaks import check_class_names, check_disjoint, check_shared_files
from sslcli.data.sources.listing import Files as Files
from sslcli.data.sources.listing import Listing as Listing
from sslcli.data.sources.scan import FileSearch, LinkedFolders, Root, check_folder, parse_roots

LABEL_COLUMN = "correct it, choose another column with dataset.label, or set it to null"


class ImageFiles(EncodedImages, Files):
    """Base class of datasets in which each file is one image.

    Args:
        keep_decoded: cache of decoded full-size images: "ram" = in memory, "disk" = in a file, "none" = no cache. See
            `sslcli.data.decoded_cache`.
        keep_gb: the largest size of the cache in GB (10**9 bytes).
        keep_dir: the folder of the cache file; None = a folder in the user's cache.
        common: the arguments of `EncodedImages`.
    """

    decoded_cache: DecodedCache | None = None
    lists_files_once = True  # False if the same file may be listed twice

    def __init__(
        self,
        *,
        keep_decoded: str = "none",
        keep_gb: float = 8.0,
        keep_dir: str | os.PathLike[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_cache_options(keep_decoded, keep_gb)
        self.keep_decoded, self.keep_gb = keep_decoded, keep_gb
        self.keep_dir = keep_dir

    def fill(self, pool: Listing, test: Listing, **options: Any) -> None:
        """Set the files as `Files.fill` does. Then check the splits, and create the cache of decoded images.

        If `keep_decoded` is "none", no cache is created.

        pool: the files that are split into train and val.
        test: the files of the official test split; may be empty.
        options: further arguments of `Files.fill`.

        Raises ConfigError if the same file is in two splits, or if the images do not fit in the cache.
        """
        super().fill(pool, test, **options)
        splits = self.nonempty_splits()
        if len(splits) > 1:
            disjoint = splits | {"train": self.without_labels_of("val")}
            check_shared_files(disjoint, self.path, roots=self.roots if self.lists_files_once else ())
        if self.keep_decoded != "none":
            folder = cache_folder(self.keep_dir) if self.keep_decoded == "disk" else None
            self.decoded_cache = DecodedCache(
                self.path,
                self.used(),
                folder=folder,
                name=self.name,
                gigabytes=self.keep_gb,
                pixel_format=self.pixel_format,
            )

    def open(self, position: int) -> OpenedImage:
        """Open the image at `position`. Raises BadImage if the file cannot be read or is not an image."""
        if self.decoded_cache is not None:
            return self.decoded_cache.open(position)
        return open_file(self.path(position), pixel_format=self.pixel_format)


class Folder(ImageFiles):
    """Dataset of class folders, `root/<class>/**/<image>`. The label of an image is the name of its class folder.

    Args:
        root: a folder, a list of folders, or a mapping from folder to weight. With weight 2.0, an epoch contains each
            training image of the folder twice. With weight 0.5, an epoch contains half of the training images of the
            folder. The classes of several roots are merged by name.
        test: the folder of the official test split, which contains class folders; None = no test split.
        extensions: extensions of the files to read, such as ["jpg", "png"]; None = all image files, see `FileSearch`.
        linked_folders: "once" or "always", see `FileSearch`.
        common: the arguments of `ImageFiles`.

    Class folders without images, images outside of class folders, and other files are ignored with a warning.

    Raises ValueError if a root is missing, is not a folder, cannot be read, or has no images in class folders. Raises
    ConfigError if the same image would be in two splits, or if the names of all class folders are names of splits, such
    as `train` and `test`.
    """

    def __init__(
        self,
        *,
        root: Root,
        test: str | os.PathLike[str] | None = None,
        extensions: Sequence[str] | None = None,
        linked_folders: LinkedFolders = "once",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        allowed = parse_extensions(extensions)
        roots = parse_roots(root)
        check_disjoint(roots, None if test is None else os.path.expanduser(test))
        found = [FileSearch(folder, allowed, linked_folders).classes() for folder in roots]
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
            for name, files in FileSearch(test, allowed, linked_folders).classes().items():
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

    Raises ValueError if `train` or `val` is missing. Users must download ImageNet themselves.
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
        root, extensions, linked_folders: as for `Folder`.
        common: the arguments of `ImageFiles`.

    Raises ValueError in the same cases as `Folder`.
    """

    def __init__(
        self,
        *,
        root: Root,
        extensions: Sequence[str] | None = None,
        linked_folders: LinkedFolders = "once",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        allowed = parse_extensions(extensions)
        roots = parse_roots(root)
        check_disjoint(roots)
        pool = Listing()
        for number, folder in enumerate(roots):
            pool.add(FileSearch(folder, allowed, linked_folders).files(), label=-1, root=number)
        pool.sort()
        weights = list(roots.values())
        self.fill(pool, Listing(), name=base_name(roots), roots=list(roots), classes=[], weights=weights)


class ListFile(ImageFiles):
    """Images listed in a CSV file with a header, a column of paths and optionally a column of labels.

    The labels are text or integers, see `as_labels`. The classes of `file` and `test` are merged by name.

    Args:
        file: the CSV file, see `read_csv`. The positions of the images follow the order of the rows, but test images
            have the last positions.
        root: the folder to which the paths are relative; None = the folder of the CSV file.
        test: a CSV file of the images of the official test split; None = no such file.
        image: the column of the paths; "auto" = the column `path`.
        label: the column of the labels; "auto" = the column `label`, if it exists; None = no labels.
        split_column: the column of the splits (train, val, test). None = `file` has no test images, and its validation
            images are selected with `val_fraction`. If the column has validation images, `val_fraction` has no effect.
        common: the arguments of `ImageFiles`.

    Raises ConfigError in three cases: a CSV file is missing or invalid, lacks a column, or has no rows; none of about
    20 checked image files exists; the same image would be in two splits. Raises ValueError if `root` is not a folder.
    """

    lists_files_once = False

    def __init__(
        self,
        *,
        file: str | os.PathLike[str],
        root: str | os.PathLike[str] | None = None,
        test: str | os.PathLike[str] | None = None,
        image: str = AUTO,
        label: str | None = AUTO,
        split_column: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        test = None if test is None else os.path.expanduser(test)
        lists = read_lists(os.path.expanduser(file), test, image=image, label=label, split=split_column)
        roots = [
            os.path.dirname(os.path.abspath(each.file)) if root is None else os.path.expanduser(root) for each in lists
        ]
        for each, base in zip(lists, roots, strict=True):
            check_folder(base, key="dataset.root")
            check_files_exist(each.names, base, file=each.file)
        parts = [
            Labels(each.labels, (), f"the column {each.label_column} of {each.file}", number > 0, LABEL_COLUMN)
            for number, each in enumerate(lists)
        ]
        labels, classes = as_labels(parts)
        pool, test_files = Listing(), Listing()
        for number, (each, listing) in enumerate(zip(lists, (pool, test_files), strict=False)):
            listing.names, listing.roots = each.names, [number] * len(each.names)
        pool.labels, test_files.labels = labels[: len(pool.names)].tolist(), labels[len(pool.names) :].tolist()
        held_out = [split == "val" for split in lists[0].splits]
        self.fill(
            pool,
            test_files,
            name=Path(file).stem,
            roots=roots,
            classes=classes,
            held_out=held_out if any(held_out) else None,
        )


def base_name(roots: Iterable[str]) -> str:
    """Return the name of the dataset: the last part of each root, joined by "+"."""
    return "+".join(Path(root).absolute().name for root in roots)
