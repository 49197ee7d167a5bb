"""Parser of CSV files that list images: paths, labels and splits."""

from __future__ import annotations

import codecs
import csv
import os
import warnings
from collections.abc import Container, Iterator
from dataclasses import dataclass
from io import StringIO

from sslcli.data.sources.columns import AUTO, LABEL_NAMES
from sslcli.data.sources.leaks import split_kind
from sslcli.errors import ConfigError, nearest
from sslcli.system.regular_files import open_regular

DELIMITERS = (",", ";", "\t", "|")
# Byte order marks. The marks of UTF-32 must come before those of UTF-16, because the little-endian mark of UTF-32
# begins with the mark of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CHECKED = 20  # approximate number of listed files that are checked; at least one of them must exist


@dataclass(frozen=True)
class ImageList:
    """The rows of a CSV file.

    Attributes:
        file: path of the CSV file.
        names: path of each image.
        labels: label of each image as text; "" = unknown.
        splits: split of each image: "train", "val" or "test". If no column of splits is read, each split is "train".
        label_column: name of the column of the labels; None = no labels were read.
    """

    file: str
    names: list[str]
    labels: list[str]
    splits: list[str]
    label_column: str | None

    def part(self, splits: Container[str]) -> ImageList:
        """Return the rows whose split is in `splits`."""
        kept = [row for row, split in enumerate(self.splits) if split in splits]
        names, labels, found = ([column[row] for row in kept] for column in (self.names, self.labels, self.splits))
        return ImageList(self.file, names, labels, found, self.label_column)


def read_lists(
    file: str, test: str | None, *, image: str = AUTO, label: str | None = AUTO, split: str | None = None
) -> list[ImageList]:
    """Return the list of the training and validation images. If there are test images, also return their list.

    The test images are listed in the CSV file `test`, or in the rows of `file` whose split in the column `split` is
    "test". See `read_csv` for the other arguments. If `file` has no labels, the labels of the test images are ignored,
    because no classifier can be trained without training labels.

    Raises ConfigError in the same cases as `read_csv`, and in three other cases: `test` is the same file as `file`;
    `file` has no training images; `test` is given although `file` has test images.
    """
    if test is not None and os.path.exists(test) and os.path.exists(file) and os.path.samefile(file, test):
        raise ConfigError(
            f"dataset.test is {test}, which is the same file as dataset.file, so test images would be used for "
            "training: set dataset.test to another list, or to null"
        )
    rows = read_csv(file, image=image, label=label, split=split)
    pool, test_rows = rows.part(("train", "val")), rows.part(("test",))
    if "train" not in pool.splits:
        raise ConfigError(f"{file} has no row with train in the column {split}: choose another dataset.split_column")
    if test is None:
        return [pool, test_rows] if test_rows.names else [pool]
    if test_rows.names:
        raise ConfigError(
            f"dataset.test is {test}, but {file} already has {len(test_rows.names)} test images in the column {split}: "
            "set dataset.test or dataset.split_column to null"
        )
    return [pool, read_csv(test, key="dataset.test", image=image, label=label if rows.label_column else None)]


def read_csv(
    file: str, *, key: str = "dataset.file", image: str = AUTO, label: str | None = AUTO, split: str | None = None
) -> ImageList:
    """Read a CSV file of images.

    The delimiter may be a comma, semicolon, tab or vertical bar. They are tried in this order, until the header has
    the column of the paths. Spaces around values are removed. Values in double quotes may contain delimiters.

    Args:
        file: the CSV file, in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.
        key: the configuration key of `file`, for messages.
        image: the column of the paths; "auto" = the column `path`.
        label: the column of the labels; "auto" = the column `label`, if it exists; None = no labels.
        split: the column of the splits; None = all images are training images.

    Raises ConfigError if the file cannot be read, is not a valid CSV file, or lacks a column. If a line of the file is
    invalid, the message contains its number.
    """
    content = _read_text(file, key)
    image_column = "path" if image == AUTO else image
    delimiter = _delimiter(content, file, key, image_column)
    rows = _rows(content, delimiter, file, key)
    _, header = next(rows)
    label_column = _label_column(header, file, label)
    _check_header(header, file, [image_column, label_column, split])
    found = ImageList(file, [], [], [], label_column)
    for number, row in rows:
        if len(row) != len(header):
            raise ConfigError(
                f"{file} line {number} has {len(row)} fields, but the header has {len(header)} "
                f"({', '.join(header)}): put values that contain {_name_of(delimiter)} in double quotes, and give "
                "every line all fields"
            )
        values = dict(zip(header, row, strict=True))
        name, text = values[image_column], "" if label_column is None else values[label_column]
        _check_row(file, number, name, text)
        found.names.append(name)
        found.labels.append(text)
        found.splits.append("train" if split is None else _split(values[split], f"{file} line {number}", split))
    if not found.names:
        raise ConfigError(f"{file} has no rows below its header: list at least one image")
    _check_labels(file, found.labels)
    return found


def check_files_exist(names: list[str], base: str, *, file: str) -> None:
    """Check a few of the listed files, and raise ConfigError if all of these are missing. Checking all would take long.

    Args:
        names: the paths of the images.
        base: the folder to which the paths are relative.
        file: the CSV file, for the message.
    """
    sample = names[:: max(1, len(names) // _CHECKED)]
    if not any(os.path.lexists(os.path.join(base, name)) for name in sample):
        raise ConfigError(
            f"{file} lists {sample[0]!r}, but {os.path.join(base, sample[0])} does not exist, nor does the file of "
            f"any of {len(sample)} rows checked: set dataset.root to the folder that the paths are relative to"
        )


def _read_text(file: str, key: str) -> str:
    """Return the text of a CSV file. `key` is the configuration key of the file, for messages.

    The encoding is UTF-8, or UTF-16 or UTF-32 if the file starts with a byte order mark of this encoding. Raises
    ConfigError if the file cannot be read or is not text in this encoding. If a byte is invalid, the message contains
    the number of its line.
    """
    try:
        with open_regular(file) as opened:
            content = opened.read()
    except OSError as error:
        raise ConfigError(f"{key}={file} cannot be read: {error.strerror}; set it to a CSV file") from error
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in content and encoding == "utf-8":
            raise ConfigError(f"{key}={file} is not a CSV file in UTF-8: it contains NUL bytes") from error
        line = content.count(b"\n", 0, error.start) + 1
        shown = ascii(content[max(0, error.start - 20) : error.start + 20])[2:-1]
        raise ConfigError(
            f"{key}={file} is not a CSV file in UTF-8: line {line} has the byte 0x{content[error.start]:02x} in "
            f"'{shown}'. Save the file in UTF-8, for example with `iconv -f ISO-8859-1 -t UTF-8`"
        ) from error
    if "\0" in text:
        raise ConfigError(f"{key}={file} is not a CSV file in UTF-8: it contains NUL bytes")
    return text


def _delimiter(content: str, file: str, key: str, image_column: str) -> str:
    """Return the first of `DELIMITERS` that splits the header into columns of which one is `image_column`.

    Raises ConfigError if there is no such delimiter.
    """
    headers = []
    for delimiter in DELIMITERS:
        reader = csv.reader(StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True)
        try:
            headers.append([name.strip() for name in next((row for row in reader if row), [])])
        except csv.Error as error:
            raise ConfigError(f"{key}={file} is not a CSV file, line 1: {error}") from error
        if image_column in headers[-1]:
            return delimiter
    columns = max(headers, key=len)
    raise ConfigError(
        f"{file} has the columns {', '.join(columns) or '(none)'}, but it needs a header line with the column "
        f"`{image_column}`, separated by commas, semicolons, tabs or vertical bars. Set dataset.image to the column "
        f"that contains the paths.{nearest(image_column, columns)}"
    )


def _label_column(header: list[str], file: str, wanted: str | None) -> str | None:
    """Return the name of the column of the labels, or None if the images have no labels.

    wanted: the setting `dataset.label`. "auto" selects the column `label`. If `header` has no such column, but another
        column whose name suggests labels, a warning is printed.
    """
    if wanted != AUTO:
        return wanted
    if "label" in header:
        return "label"
    likely = [name for name in header if name.lower() in LABEL_NAMES]
    if likely:
        warnings.warn(
            f"{file} has no column `label`, so its images are unlabeled: set dataset.label={likely[0]} if this column "
            "contains the labels, or dataset.label=null if it does not",
            stacklevel=3,
        )
    return None


def _check_header(header: list[str], file: str, columns: list[str | None]) -> None:
    """Raise ConfigError unless each name in `columns` occurs once in the header.

    `columns` contains the names of the columns of images, labels and splits.
    """
    keys = ("dataset.image", "dataset.label", "dataset.split_column")
    for key, name in zip(keys, columns, strict=True):
        if name is not None and name not in header:
            raise ConfigError(
                f"{key} is {name!r}, but {file} has no such column.{nearest(name, header)} Its columns: "
                f"{', '.join(header)}"
            )
        if name is not None and header.count(name) > 1:
            raise ConfigError(f"{file} has {header.count(name)} columns named {name}: rename or remove all but one")


def _rows(content: str, delimiter: str, file: str, key: str) -> Iterator[tuple[int, list[str]]]:
    """Yield a pair for each row that is not empty: the number of its last line, and its fields without outer spaces.

    `content` is the text of the CSV file. `file` (the path of the file) and `key` (the setting that contains the path)
    are used in error messages. Raises ConfigError if the text is not valid CSV.
    """
    reader = csv.reader(StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, [value.strip() for value in row]
    except csv.Error as error:
        raise ConfigError(
            f"{key}={file} is not a CSV file, line {reader.line_num}: {error}. Double quotes must enclose a "
            "whole value, and a double quote inside a value must be written twice"
        ) from error


def _check_row(file: str, number: int, name: str, label: str) -> None:
    if not name:
        raise ConfigError(f"{file} line {number} has no path: fill it in or remove the line")
    if "\n" in f"{name}{label}" or "\r" in f"{name}{label}":
        raise ConfigError(
            f"{file} has a line break in the path or label that ends in line {number}: check its double quotes"
        )


def _split(value: str, where: str, column: str) -> str:
    """Return "train", "val" or "test", the split that a value such as `training` or `val2017` stands for.

    where: file and line of the value, for messages.
    column: name of the column of the value, for messages.

    Raises ConfigError if the value stands for no split.
    """
    kind = split_kind(value)
    if kind is None:
        raise ConfigError(
            f"{where} has {value!r} in the column {column} (dataset.split_column), but it must be train, val or test"
        )
    return kind


def _check_labels(file: str, labels: list[str]) -> None:
    """Raise ConfigError if there is only one class and its name contains a delimiter.

    Such a name seems to be several columns, separated by another delimiter than the columns of the header.
    """
    found = {label for label in labels if label}
    if len(found) == 1 and len(labels) > 1:
        (label,) = found
        if any(delimiter in label for delimiter in DELIMITERS):
            raise ConfigError(
                f"{file} has the single label {label!r}, which seems to be several columns: separate all columns by "
                "the delimiter of the header, or set dataset.label=null"
            )


def _name_of(delimiter: str) -> str:
    return {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}[delimiter]
