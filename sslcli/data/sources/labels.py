"""Conversion of labels to class numbers. The classes of all splits and shards of a dataset are merged by name."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sslcli.errors import ConfigError

Value = int | float | str | None
"""One label as stored in a table, a file or JSON."""

UNKNOWN = frozenset(["", "-1", "nan", "NaN", "NAN", "None", "null", "NULL", "<NA>"])
MANY_CLASSES = 20  # a dataset with fewer classes causes no warning
_MINUS_ONE = re.compile(r"-1(\.0*)?")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
_OTHER_COLUMN = "choose another column with dataset.label, or set it to null"


@dataclass(frozen=True)
class Labels:
    """The labels of one split, shard or file.

    Attributes:
        values: one stored label per image. None, -1, -1.0, NaN and the texts in `UNKNOWN` mean an unknown label.
        classes: class names. An integer label is an index into this list. Empty if the data have no class names.
        where: the location of the labels, for error messages.
        is_test: True for the labels of the official test split. These labels must not add classes.
        remedy: advice for the user in error messages about values that are not class labels.
    """

    values: Sequence[object]
    classes: Sequence[str]
    where: str
    is_test: bool = False
    remedy: str = _OTHER_COLUMN


def as_labels(parts: Sequence[Labels]) -> tuple[Tensor, list[str]]:
    """Return the class numbers (n,) int64 of the images of all parts (-1 = unknown), and the class names.

    A part contains the labels of one split, shard or file. In the tensor of class numbers, the images of the
    first part come first, followed by the images of the second part, and so on.

    - If any part has class names, the classes of all parts are merged by name, never by number.
    - If no part has class names, the classes are the distinct values of the training parts. The classes are in
      numerical order if all of them are numbers, else in alphabetical order.

    Raises ConfigError in these cases:
    - a value is not a class label, or most distinct values are numbers that are not integers
    - a part has numbers without class names, although another part has class names
    - the same class is written in several ways, or several classes have the same name
    - a test part has a class that the training parts lack

    A warning is printed if no part has class names and there are almost as many classes as labeled images.
    """
    cleaned = [_cleaned(part) for part in parts]
    if any(part.classes for part in parts):
        classes, tables = _by_name(parts, cleaned)
    else:
        classes, tables = _by_value(parts, cleaned)
    found: list[int] = []
    for part, values, numbers in zip(parts, cleaned, tables, strict=True):
        found += _numbered(part, values, numbers, classes)
    return torch.tensor(found, dtype=torch.int64), classes


def plain_label(value: object, *, where: str) -> Value:
    """Convert a label to a type that JSON supports. `where` names the location of the label in messages.

    A label may be None, a boolean, a number, a text, or UTF-8 bytes. It may also be a scalar of NumPy, torch or pyarrow
    with such a value. Raises ConfigError for any other value, such as a list.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0):
        return plain_label(value.item(), where=where)
    # The value can be a pyarrow scalar only if pyarrow is imported. Another thread may be importing pyarrow at this
    # time.
    scalar = getattr(sys.modules.get("pyarrow"), "Scalar", None)
    if scalar is not None and isinstance(value, scalar):
        return plain_label(value.as_py(), where=where)
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (bytes, bytearray)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} contains bytes that are not UTF-8 text: {_OTHER_COLUMN}") from error
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, (Sequence, Mapping, set, np.ndarray, Tensor)):
        raise ConfigError(
            f"{where} contains {text}, a {type(value).__name__}, but an image has one label (multi-label datasets are "
            f"not supported): {_OTHER_COLUMN}"
        )
    raise ConfigError(
        f"{where} contains {text}, a {type(value).__name__}, but a label must be text or an integer: {_OTHER_COLUMN}"
    )


def _cleaned(part: Labels) -> list[int | str | None]:
    """Return the labels in `part.values` as integers or stripped texts; None = unknown."""
    values: Sequence[object] = part.values
    if not set(map(type, values)) <= {int, float, str, type(None)}:
        values = [_without_bool(plain_label(value, where=part.where), part) for value in values]
    names = frozenset(part.classes)
    known = {value: _clean(value, names, part) for value in set(values)}
    return [known[value] for value in values]


def _without_bool(value: Value, part: Labels) -> Value:
    """Convert a boolean label to an integer if the dataset has class names, else to text.

    `part` contains the label. Its attribute `classes` contains the class names. Return other values unchanged.
    """
    if not isinstance(value, bool):
        return value
    return int(value) if part.classes else str(value)


def _clean(value: object, names: frozenset[str], part: Labels) -> int | str | None:
    if isinstance(value, str):
        if value in names:
            return value
        text = value.strip()
        if text in UNKNOWN or _MINUS_ONE.fullmatch(text):
            return None
        if names and text not in names and _NUMBER.fullmatch(text) and float(text).is_integer():
            return int(float(text))
        return text
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise ConfigError(_not_a_class(value, part))
        value = int(value)
    assert value is None or isinstance(value, int)
    return None if value == -1 else value


def _not_a_class(value: object, part: Labels) -> str:
    return (
        f"{part.where} contains {value}, which seems to be a regression target and not a class label (class labels are "
        f"text or integers): {part.remedy}"
    )


Numbers = dict[int | str, int]
"""Class number of each distinct label of a part."""


def _by_name(parts: Sequence[Labels], cleaned: Sequence[list[int | str | None]]) -> tuple[list[str], list[Numbers]]:
    """Return the merged class names, and one mapping per part from the labels of the part to class numbers.

    parts: the labels of the splits, shards or files of a dataset.
    cleaned: the labels of each part, as `_cleaned` returns them.
    """
    known = [{value for value in values if value is not None} for values in cleaned]
    named = [part for part in parts if part.classes]
    is_trained = any(values and not part.is_test for part, values in zip(parts, known, strict=True))
    pool = [part for part in named if not part.is_test] or ([] if is_trained else named)
    differ = not pool or len({tuple(part.classes) for part in named}) > 1
    for part in named if differ else ():
        _check_unique(part)
    classes = list(dict.fromkeys(name for part in pool for name in part.classes)) if differ else list(pool[0].classes)
    for part, values in zip(parts, known, strict=True):
        if not part.classes:
            _check_names(part, values, named[0])
            if not part.is_test:
                classes += sorted({str(value) for value in values}.difference(classes))
    position = {name: number for number, name in enumerate(classes)}
    same = {} if differ else _indices(pool[0].classes)
    tables = []
    for part, values in zip(parts, known, strict=True):
        if part.classes and not differ:  # all parts have the same class names, so class numbers do not change
            tables.append(same)
        elif part.classes:
            indices = _indices(part.classes).items()
            tables.append({value: position[part.classes[i]] for value, i in indices if part.classes[i] in position})
        else:
            tables.append({value: position[str(value)] for value in values if str(value) in position})
    return classes, tables


def _indices(names: Sequence[str]) -> Numbers:
    """Return a mapping from labels to class numbers. The class number of a class is its index in `names`.

    A label may be a class number, a class number as text, or a class name. If a text is both a class name and a class
    number, it counts as a class name.
    """
    table: Numbers = {number: number for number in range(len(names))}
    table |= {str(number): number for number in range(len(names))}
    table |= {name: number for number, name in reversed(list(enumerate(names)))}
    return table


def _check_names(part: Labels, values: Iterable[int | str], named: Labels) -> None:
    """Raise ConfigError if a label is a number, because class numbers cannot be matched to class names.

    part: labels of a split, shard or file without class names. `values` are its distinct labels.
    named: labels of another split, shard or file of the same dataset, with class names.
    """
    numbers = [v for v in values if isinstance(v, int) or (_NUMBER.fullmatch(v) and v not in named.classes)]
    if numbers:
        raise ConfigError(
            f"{part.where} contains class numbers without names ({min(map(str, numbers))}, ...), but {named.where} has "
            f"class names ({_first_few(named.classes)}), so the numbers cannot be matched to classes: add the same "
            "class names to both"
        )


def _check_unique(part: Labels) -> None:
    """Raise ConfigError if two classes of `part` have the same name, because classes are merged by name."""
    name, count = Counter(part.classes).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"{part.where} has several classes named {name!r} and another list of classes than the rest of the "
            "dataset, so classes cannot be merged by name: give each class a unique name"
        )


def _by_value(parts: Sequence[Labels], cleaned: Sequence[list[int | str | None]]) -> tuple[list[str], list[Numbers]]:
    """Return the classes, and one mapping per part from the labels of the part to class numbers.

    This function is for parts without class names. The classes are the distinct labels of the training parts.

    parts: the labels of each split, shard or file.
    cleaned: the labels of each part, as `_cleaned` returns them.
    """
    known = [{value for value in values if value is not None} for values in cleaned]
    _check_kinds(parts, known)
    for part, values in zip(parts, known, strict=True):
        _check_targets(part, values)
    everything = set().union(*known)
    is_numeric = all(isinstance(value, int) or _NUMBER.fullmatch(value) for value in everything)
    names: list[dict[int | str, str]] = []
    for part, values in zip(parts, known, strict=True):
        names.append({value: _number_name(value, part) if is_numeric else str(value) for value in values})
    pool = [table for part, table in zip(parts, names, strict=True) if not part.is_test and table] or names
    texts = {name for table in pool for name in table.values()}
    classes = sorted(texts, key=lambda name: (int(name) if is_numeric else 0, name))
    if is_numeric:
        _check_spelling(classes, parts[0])
    _warn_of_many_classes(classes, parts, cleaned)
    position = {name: number for number, name in enumerate(classes)}
    tables = [{value: position[name] for value, name in table.items() if name in position} for table in names]
    return classes, tables


def _check_targets(part: Labels, values: Iterable[int | str]) -> None:
    """Raise ConfigError if most distinct labels are numbers that are not integers, such as "1.5".

    Such labels are targets of a regression. A few other texts, such as "?", do not prevent the error.
    """
    texts = [str(value) for value in values]
    fractions = [text for text in texts if _NUMBER.fullmatch(text) and not float(text).is_integer()]
    if 2 * len(fractions) > len(texts):
        raise ConfigError(_not_a_class(min(fractions), part))


def _warn_of_many_classes(
    classes: Sequence[str], parts: Sequence[Labels], cleaned: Sequence[list[int | str | None]]
) -> None:
    """Warn if there are almost as many classes as labeled training images."""
    pool = [part for part in parts if not part.is_test] or list(parts)
    labeled = sum(
        value is not None
        for part, values in zip(parts, cleaned, strict=True)
        if part.is_test == pool[0].is_test
        for value in values
    )
    if len(classes) < MANY_CLASSES or 2 * len(classes) <= labeled:
        return
    warnings.warn(
        f"{pool[0].where} has {len(classes):,} classes ({_first_few(classes)}) for {labeled:,} labeled images, so it "
        f"seems to contain regression targets or names of images and not class labels: {pool[0].remedy}",
        stacklevel=4,
    )


def _number_name(value: int | str, part: Labels) -> str:
    """Return the class name for a numeric label. `value` may be a text: both "3" and "3.0" give the class "3".

    `part` contains the label. Its attributes `where` and `remedy` are used in error messages.

    Raises ConfigError if the number is negative or not an integer.
    """
    text = str(value)
    if not text.isdecimal():
        number = float(text)
        if not number.is_integer():
            raise ConfigError(_not_a_class(text, part))
        text = str(int(number))
        if number < 0:
            raise ConfigError(
                f"{part.where} contains the label {text}, but class numbers begin at 0 and only -1 means unknown: "
                "renumber the classes, or name them by text"
            )
    return text


def _check_spelling(classes: Sequence[str], part: Labels) -> None:
    """Raise ConfigError if a number is written in two ways, such as "1" and "01", which would be two classes."""
    for one, other in pairwise(classes):
        if int(one) == int(other):
            raise ConfigError(
                f"{part.where} contains the labels {one!r} and {other!r}, which are the same number written in two "
                "ways: write each class in one way"
            )


def _check_kinds(parts: Sequence[Labels], known: Sequence[set[int | str]]) -> None:
    """Raise ConfigError if the labels of one part are class numbers and the labels of another part are class names.

    known: the distinct labels of each part, without unknown labels.
    """
    filled = [(part, values) for part, values in zip(parts, known, strict=True) if values]
    numbered = [part for part, values in filled if all(isinstance(value, int) for value in values)]
    texts = [
        (part, values)
        for part, values in filled
        if all(isinstance(value, str) for value in values) and not all(_NUMBER.fullmatch(str(v)) for v in values)
    ]
    if numbered and texts:
        part, values = texts[0]
        raise ConfigError(
            f"{numbered[0].where} contains class numbers, but {part.where} contains class names "
            f"({_first_few(sorted(map(str, values)))}): write all labels in one way"
        )


def _numbered(part: Labels, values: Sequence[int | str | None], numbers: Numbers, classes: Sequence[str]) -> list[int]:
    """Return the class number of each label in `values`; -1 = unknown. Raises ConfigError if a label is not a class.

    part: the labels of one split, shard or file.
    values: the same labels, as `_cleaned` returns them.
    numbers: class number of each label that is a class.
    classes: the class names of the dataset, for messages.
    """
    unknown = sorted({str(value) for value in values if value is not None and value not in numbers})
    indices = _indices(part.classes) if unknown else {}
    wrong = [label for label in unknown if part.classes and label not in indices]
    if wrong:
        raise ConfigError(
            f"{part.where} contains {wrong[0]!r}, which is not one of its {len(part.classes)} classes: {part.remedy}"
        )
    if unknown:
        names = [part.classes[indices[label]] if part.classes else label for label in unknown]
        raise ConfigError(
            f"{part.where} has images of the classes {_first_few(names)}, which the training images lack (their "
            f"classes: {_first_few(classes)}): remove these images, or train on all classes"
        )
    return [-1 if value is None else numbers[value] for value in values]


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
