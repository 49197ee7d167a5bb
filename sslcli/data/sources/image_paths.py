"""Dataset of given image files and folders, without labels and without a configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sslcli.data.image_formats import parse_extensions
from sslcli.data.sources.files import ImageFiles
from sslcli.data.sources.listing import Listing
from sslcli.data.sources.scan import FileSearch


class ImagePaths(ImageFiles):
    """Unlabeled images: files in the given order, and the images at any depth below folders, sorted by name.

    Args:
        paths: paths of image files and folders. A file that does not exist counts as unreadable.
        common: the arguments of `ImageFiles`.

    Raises ValueError if `paths` is empty, or if a folder cannot be read or has no images.
    """

    lists_files_once = False

    def __init__(self, *, paths: Sequence[str | os.PathLike[str]], **common: Any) -> None:
        super().__init__(**common)
        if not paths:
            raise ValueError("images is empty: name at least one image file or folder")
        pool, roots = Listing(), dict[str, int]()
        for given in paths:
            path = os.path.abspath(os.path.expanduser(os.fspath(given)))
            is_folder = os.path.isdir(path)
            names = FileSearch(path, parse_extensions(None), "once").files() if is_folder else [os.path.basename(path)]
            root = path if is_folder else os.path.dirname(path)
            pool.add(names, label=-1, root=roots.setdefault(root, len(roots)))
        self.fill(pool, Listing(), name="images", roots=list(roots), classes=[])
