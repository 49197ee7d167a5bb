"""Parser of CSV files of image paths and labels."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from io import StringIO, TextIOWrapper

from sslcli.data.sources.columns import LABEL_NAMES
from sslcli.errors import ConfigError
from sslcli.system.regular_files import open_regular

DELIMITERS = (",", ";", "\t", "|")


def read_csv(file: str) -> tuple[list[str], list[str]]:
    """Return the columns `path` and `label` of a CSV file. If there is no column `label`, all labels are "".

    The delimiter may be a comma, semicolon, tab or vertical bar. The first delimiter with which the header has a column
    `path` is used. Spaces around values are removed. Values in double quotes may contain delimiters.

    Raises ConfigError if the file cannot be read or is not a valid CSV file. The message names the line.
    """
    try:
        with TextIOWrapper(open_regular(file), newline="", encoding="utf-8-sig") as text:
            content = text.read()
    except OSError as error:
        raise ConfigError(f"dataset.file={file} cannot be read: {error.strerror}; set it to a CSV file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"dataset.file={file} is not a CSV file in UTF-8: {error}") from error
    if "\0" in content:
        raise ConfigError(f"dataset.file={file} is not a CSV file in UTF-8: it contains NUL bytes")
    delimiter = _delimiter(content, file)
    rows = _rows(content, delimiter, file)
    _, header = next(rows)
    _check_header(header, file)
    names: list[str] = []
    labels: list[str] = []
    for number, row in rows:
        if len(row) != len(header):
            raise ConfigError(
                f"{file} line {number} has {len(row)} fields, but the header has {len(header)} "
                f"({', '.join(header)}): put values that contain {_name_of(delimiter)} in double quotes, and give "
                "every line all fields"
            )
        values = dict(zip(header, row, strict=True))
        name, label = values["path"], values.get("label", "")
        _check_row(file, number, name, label)
        names.append(name)
        labels.append(label)
    if not names:
        raise ConfigError(f"{file} has no rows below its header: list at least one image")
    _check_labels(file, labels)
    return names, labels


def _delimiter(content: str, file: str) -> str:
    """Return the first delimiter with which the header has a column `path`."""
    headers = []
    for delimiter in DELIMITERS:
        reader = csv.reader(StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True)
        try:
            headers.append([name.strip() for name in next((row for row in reader if row), [])])
        except csv.Error as error:
            raise ConfigError(f"dataset.file={file} is not a CSV file, line 1: {error}") from error
        if "path" in headers[-1]:
            return delimiter
    raise ConfigError(
        f"{file} has the columns {', '.join(headers[0]) or '(none)'}, but it needs a header line with the column "
        "`path` and optionally `label`, separated by commas, semicolons, tabs or vertical bars"
    )


def _check_header(header: list[str], file: str) -> None:
    """Raise ConfigError if a column occurs twice. Warn if the labels seem to be in a column with another name."""
    for name in ("path", "label"):
        if header.count(name) > 1:
            raise ConfigError(f"{file} has {header.count(name)} columns named {name}: rename or remove all but one")
    likely = [name for name in header if name.lower() in LABEL_NAMES]
    if likely and "label" not in header:
        warnings.warn(
            f"{file} has no column `label`, so its images are unlabeled: rename the column {likely[0]!r} to label "
            "if it contains the labels",
            stacklevel=3,
        )


def _rows(content: str, delimiter: str, file: str) -> Iterator[tuple[int, list[str]]]:
    """Yield a pair for each row that is not empty: the number of its last line, and its fields without outer spaces."""
    reader = csv.reader(StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, [value.strip() for value in row]
    except csv.Error as error:
        raise ConfigError(
            f"dataset.file={file} is not a CSV file, line {reader.line_num}: {error}. Double quotes must enclose a "
            "whole value, and a double quote inside a value must be written twice"
        ) from error


def _check_row(file: str, number: int, name: str, label: str) -> None:
    if not name:
        raise ConfigError(f"{file} line {number} has no path: fill it in or remove the line")
    if "\n" in f"{name}{label}" or "\r" in f"{name}{label}":
        raise ConfigError(
            f"{file} has a line break in the path or label that ends in line {number}: check its double quotes"
        )


def _check_labels(file: str, labels: list[str]) -> None:
    """Raise ConfigError if there is only one class and its name contains a delimiter."""
    found = {label for label in labels if label}
    if len(found) == 1 and len(labels) > 1:
        (label,) = found
        if any(delimiter in label for delimiter in DELIMITERS):
            raise ConfigError(
                f"{file} has the single label {label!r}, which seems to be several columns: separate all columns by "
                "the delimiter of the header, or remove the column label"
            )


def _name_of(delimiter: str) -> str:
    return {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}[delimiter]
