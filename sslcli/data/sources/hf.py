"""Datasets that are read with the library `datasets` of Hugging Face, from the hub or from local folders and files.

The configuration is conf/dataset/hf.yaml. `datasets` is an optional dependency: pip install datasets. The tables
are memory-mapped. Therefore a dataset may be larger than the memory. For datasets that are larger than the disk, see
`sslcli.data.shards.source`.
"""

from __future__ import annotations

import errno
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sslcli.data.bad_images import BadImage
from sslcli.data.decode import Encoded, open_file
from sslcli.data.sources.columns import columns_of, image_column
from sslcli.data.sources.encoded import EncodedImages
from sslcli.data.sources.file_status import hash_of, hashes_of, status_of
from sslcli.data.sources.hf_labels import labels_of
from sslcli.data.sources.labels import as_labels
from sslcli.data.sources.records import UNKNOWN, ProgressCallback, Records, code_of, digest, label_codes, make_records
from sslcli.errors import ConfigError, nearest

BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
HubName = str  # a local path if this file or folder exists, else the name of a dataset on the hub
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)  # errors of a folder that cannot be written
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)  # errors of a folder that does not exist or is a file
_FINGERPRINT_IMAGES = 512
_ROWS_PER_READ = 1 << 16
SAVED_FILES = ("dataset_dict.json", "state.json")  # `save_to_disk` writes one of these files into its folder


class Hf(EncodedImages):
    """A dataset that is read with `datasets.load_dataset` or `datasets.load_from_disk`.

    Args:
        path: one of: a folder of parquet files; a folder that `save_to_disk` wrote; a .parquet, .arrow or .tar file;
            the name of a dataset on the hub such as "uoft-cs/cifar10".
        name: the name of the configuration, for a dataset with several configurations.
        split: the name of the split for training.
        test: the name of the official test split; None = no test split.
        image, label: the names of the image column and the label column. "auto" detects the column. label=None: no
            labels.
        data_files: paths or patterns, relative to `path`, of the files to read; None = all files.
        revision: a branch, tag or commit on the hub.
        cache: the folder in which `datasets` stores prepared copies. None = the default cache of `datasets`, in the
            folder of the environment variable HF_HOME.
        common: the arguments of `EncodedImages`.

    Images are identified by positions: the image in row i of `split` has position i. The positions of `test` begin
    after the last position of `split`.

    Raises ConfigError if `datasets` is not installed, or if the dataset cannot be found or read.
    """

    def __init__(
        self,
        *,
        path: HubName | os.PathLike[str],
        name: str | None = None,
        split: str = "train",
        test: str | None = None,
        image: str = "auto",
        label: str | None = "auto",
        data_files: str | list[str] | None = None,
        revision: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        path = os.path.expanduser(os.fspath(path))
        if test == split:
            raise ConfigError(
                f"dataset.test is {test!r}, which is also dataset.split, so test images would be used for training: "
                "set dataset.test to another split, or to null"
            )
        options = {"name": name, "data_files": data_files, "revision": revision, "cache_dir": cache}
        splits = read_splits(path, [split, *([] if test is None else [test])], **options)
        self.name, where = Path(path).name, f"dataset.path={path}"
        image_names = [image_column(columns_of(table.features.arrow_schema), image, where=where) for table in splits]
        found = labels_of(splits, label, names=[split, test], where=where, path=path, options=options)
        self.labels, self.classes = as_labels(found)
        self._tables = [_images(*pair) for pair in zip(splits, image_names, strict=True)]
        self._split_names, self._is_saved = [split, test], is_saved_to_disk(path)
        self._num_pool = len(splits[0])
        pool = torch.arange(self._num_pool)
        self.split(pool, labeled=self.labels[: len(pool)] >= 0, num_test=len(self.labels) - len(pool))

    def open(self, position: int) -> Encoded:
        """Open the image at `position`. Raises BadImage if this row of the dataset contains no image."""
        value, path = self.cell(position), self.path(position)
        if isinstance(value, dict):  # `datasets` stores an image as a struct of bytes and path
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return open_file(value, pixel_format=self.pixel_format)
        if not isinstance(value, bytes):
            raise BadImage(path, "the cell is empty" if value is None else f"the cell contains {type(value).__name__}")
        return Encoded(value, path, pixel_format=self.pixel_format)

    def stored_size(self, position: int) -> tuple[int, int] | None:
        """Return width and height in pixels of the image at `position`, or None if it cannot be read."""
        try:
            return self.open(position).size
        except BadImage:
            return None

    def cell(self, position: int) -> Any:
        """Return the value of the image column in the row at `position`, without decoding the image."""
        test = position >= self._num_pool
        column = self._tables[test][position - test * self._num_pool].column(0)
        return column[0].as_py()

    def path(self, position: int) -> str:
        """Return a text with the dataset, the split and the row, such as "cifar10/train[7]"."""
        test = position >= self._num_pool
        return f"{self.name}/{self._split_names[test]}[{position - test * self._num_pool}]"

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the dataset in 16 hex digits.

        The digits are the start of a sha256. The hash includes the number of rows, the class names, all labels, and the
        images in evenly spaced rows.
        """
        sample = range(0, len(self), max(1, len(self) // _FINGERPRINT_IMAGES))
        cells = (repr(self.cell(position)).encode() for position in sample)
        return digest((repr([len(self), self.classes]).encode(), self.labels.numpy().tobytes(), *cells))

    def records(self, *, contents: bool = False, on_progress: ProgressCallback | None = None) -> Records:
        """Return one record per row, with which a resumed run detects changed images.

        A record contains the size of the image in bytes, and a stamp that changes when the files of the table are
        rewritten. If a row contains the path of an image file instead of an image, the record has the size of this
        file. The stamp then also depends on the modification time of this file.

        contents: whether to hash the images.
        on_progress: callback that reports the progress of long calls.
        """
        paths, sizes, stamps = self._cells()
        external = np.flatnonzero([path is not None for path in paths])  # rows that contain the path of an image file
        if len(external):
            sizes[external], times = status_of(len(external), lambda number: str(paths[external[number]]), on_progress)
            stamps[external] = [
                code_of(b"%d %d" % pair) for pair in zip(stamps[external].tolist(), times.tolist(), strict=True)
            ]
        hashes = np.full(len(self), UNKNOWN, np.uint64)
        if contents:
            for row in np.flatnonzero([path is None for path in paths]).tolist():
                hashes[row] = hash_of(iter((repr(self.cell(row)).encode(), b"")).__next__)
                if on_progress is not None and row % 1024 == 0:
                    on_progress(row, len(self))
            hashes[external] = hashes_of(len(external), lambda number: str(paths[external[number]]), on_progress)
        names = (self.path(row).encode("utf-8", "surrogateescape") for row in range(len(self)))
        labels = label_codes(self.labels, self.classes)
        return make_records(names, labels, sizes=sizes, stamps=stamps, contents=hashes)

    def _cells(self) -> tuple[list[str | None], NDArray[np.int64], NDArray[np.int64]]:
        """Return three values per row of the tables: path, size in bytes, and stamp.

        The path is the path of the image file, or None if the table contains the image itself. The stamp is a number
        that changes when the files of the table are rewritten. See `cell_sizes` and `stamp_of`.
        """
        paths: list[str | None] = []
        sizes, stamps = [], []
        for table in self._tables:
            stamp = stamp_of(table, self._is_saved)
            for first in range(0, len(table), _ROWS_PER_READ):
                column = table[first : first + _ROWS_PER_READ].column(0)
                column_sizes, column_paths = cell_sizes(column)
                paths += column_paths
                sizes.append(column_sizes)
                stamps.append(np.full(len(column), stamp))
        return paths, np.concatenate(sizes), np.concatenate(stamps)


def cell_sizes(column: Any) -> tuple[NDArray[np.int64], list[str | None]]:
    """Return two values per cell of an image column: the number of bytes of its image, and the path of an image file.

    A cell contains the bytes of an image, or a path, or neither. Without bytes, the number of bytes is -1. With bytes,
    the path is None. Only the offsets of the cells are read, not the images.
    """
    import pyarrow
    import pyarrow.compute

    column = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    path = pyarrow.nulls(len(column), pyarrow.string())
    if pyarrow.types.is_struct(column.type):
        known = {column.type.field(number).name for number in range(column.type.num_fields)}
        path = pyarrow.compute.struct_field(column, "path") if "path" in known else path
        column = pyarrow.compute.struct_field(column, "bytes") if "bytes" in known else path
    if not (pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)):
        path = column if pyarrow.types.is_string(column.type) else path
        return np.full(len(column), -1, np.int64), path.to_pylist()
    size = pyarrow.compute.fill_null(pyarrow.compute.binary_length(column), -1)
    path = pyarrow.compute.if_else(pyarrow.compute.is_null(column), path, None)
    return size.to_numpy(zero_copy_only=False).astype(np.int64), path.to_pylist()


def stamp_of(table: Any, is_saved: bool) -> int:
    """Return a number that changes when the files of a table are rewritten.

    is_saved: whether `save_to_disk` wrote the files. If True, the number depends on the sizes and modification times of
        the files. If False, the number depends on the name of the folder that contains the files. `datasets` prepares
        these files anew on every machine, and names the folder by the modification times of the original files.
    """
    parts = []
    for file in sorted(entry["filename"] for entry in table.cache_files):
        folder, name = os.path.split(file)
        if is_saved:
            sizes, times = status_of(1, lambda _, file=file: file)  # type: ignore[misc]
            parts.append(f"{name} {sizes[0]} {times[0]}")
        else:
            parts.append(f"{os.path.basename(folder)} {name}")
    return code_of(*map(os.fsencode, parts)) if parts else 0


def read_splits(path: str, wanted: list[str], **options: Any) -> list[Any]:
    """Return one `datasets.Dataset` for each split name in `wanted`. See `Hf` for the other arguments.

    Raises ConfigError if `datasets` is not installed, or a split cannot be read, is missing or is empty.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"dataset=hf needs the package datasets, which cannot be imported ({error}): pip install datasets"
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # `datasets` also raises errors as exceptions
    try:
        found = _load(datasets, path, options)
    # The network, the code that builds the dataset, or a damaged file may raise nearly any exception type.
    except Exception as error:
        cache = os.fspath(options["cache_dir"] or datasets.config.HF_DATASETS_CACHE)
        raise ConfigError(_cache_failure(cache, error) or _failure(path, options, error)) from error
    if isinstance(found, datasets.Dataset):  # a folder that `save_to_disk` wrote may contain a single split
        found = {str(found.split or wanted[0]): found}
    for split in wanted:
        if split not in found:
            raise ConfigError(
                f"dataset.path={path} has no split {split!r}.{nearest(split, found)} Its splits: "
                f"{', '.join(found)}. Set dataset.split, and dataset.test to one of them or null"
            )
        if len(found[split]) == 0:
            raise ConfigError(f"the split {split!r} of dataset.path={path} is empty: choose another")
    return [found[split] for split in wanted]


def is_saved_to_disk(path: str) -> bool:
    """Return whether the method `save_to_disk` of `datasets` wrote the folder `path`."""
    return any(os.path.exists(os.path.join(path, name)) for name in SAVED_FILES)


def _load(datasets: Any, path: str, options: dict[str, Any]) -> Any:
    if os.path.isdir(path):
        return datasets.load_from_disk(path) if is_saved_to_disk(path) else datasets.load_dataset(path, **options)
    if os.path.isfile(path):
        builder = BUILDERS.get(Path(path).suffix)
        if builder is None:
            raise ConfigError(f"only files that end in {', '.join(BUILDERS)} are supported")
        return datasets.load_dataset(builder, **options | {"data_files": path})
    if path.startswith(("/", ".")) or path.count("/") > 1:
        raise FileNotFoundError("there is no such file or folder")
    return datasets.load_dataset(path, **options)


def _cache_failure(cache: str, error: Exception) -> str | None:
    """Return the message for a cache of `datasets` that cannot be written, or None if the error has another cause."""
    while isinstance(error, Exception) and not isinstance(error, OSError):
        cause = error.__cause__ or error.__context__
        if not isinstance(cause, Exception):
            return None
        error = cause
    if error.errno not in (*REFUSED, *MISSING) or not isinstance(error.filename, (str, os.PathLike)):
        return None
    cache, place = os.path.abspath(os.path.expanduser(cache)), os.path.abspath(os.fspath(error.filename))
    inside = error.errno in REFUSED and is_inside(place, os.path.dirname(cache))
    if not inside and not is_inside(cache, place):
        return None
    return (
        f"the cache of the package datasets, {cache}, cannot be written ({place}: {error.strerror}): set dataset.cache "
        "to a writable folder, or the environment variable HF_HOME (by default, it is in HOME)"
    )


def is_inside(path: str, folder: str) -> bool:
    """Return True if an absolute path is a folder or is inside it."""
    return os.path.commonpath([path, folder]) == folder


def _failure(path: str, options: dict[str, Any], error: Exception) -> str:
    """Return a one-line error message that names the dataset, the reason, and a remedy."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    arguments = "".join(f", dataset.{key}={value}" for key, value in options.items() if value and key != "cache_dir")
    if os.path.exists(path):
        cause = error.__cause__ or error.__context__
        inner = f": {str(cause).splitlines()[0]}" if cause is not None and str(cause) else ""
        return f"dataset.path={path}{arguments} cannot be read ({reason}{inner}): repair it, or change dataset.path"
    if isinstance(error, FileNotFoundError) and path.startswith(("/", ".")):
        return (
            f"dataset.path={path}: there is no file or folder {os.path.abspath(path)}: set dataset.path to the folder "
            "or file of the images"
        )
    return (
        f"dataset.path={path}{arguments} is not a local folder ({os.path.abspath(path)}), and cannot be downloaded "
        f"from the Hugging Face hub ({reason}). Check the name, log in if the dataset is private, or without a network "
        f"download it elsewhere (hf download --repo-type dataset {path} --local-dir DIR) and set dataset.path=DIR"
    )


def _images(table: Any, name: str) -> Any:
    """Return the table with only its image column. Rows are returned as Arrow tables, so that no image is decoded."""
    return table.select_columns([name]).with_format("arrow")
