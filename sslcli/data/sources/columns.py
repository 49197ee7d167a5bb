"""Detection of the image column and the label column of a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sslcli.errors import ConfigError, nearest

AUTO = "auto"
LABEL_NAMES = ("label", "labels", "cls", "class", "target")


@dataclass(frozen=True)
class Column:
    """Metadata of one column of a table.

    Attributes:
        image: whether the column contains encoded images.
        classes: the class names; a number in the column is an index into this tuple. Empty if unknown.
    """

    image: bool = False
    classes: tuple[str, ...] = ()


def columns_of(schema: Any) -> dict[str, Column]:
    """Return the columns of an Arrow schema by name.

    The library `datasets` stores in the schema which columns contain images, and the class names. If the schema does
    not state which columns contain images, two kinds of columns count as image columns: columns of bytes, and columns
    of structs whose first field is `bytes`.
    """
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    features = {name: feature for name, feature in metadata.items() if isinstance(feature, dict)}
    images = {name for name, feature in features.items() if feature.get("_type") == "Image"}
    if not images:
        images = {field.name for field in schema if re.match(r"(large_)?binary$|struct<bytes: ", str(field.type))}
    labels = {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    return {field.name: Column(field.name in images, tuple(labels.get(field.name, ()))) for field in schema}


def image_column(columns: Mapping[str, Column], wanted: str, *, where: str) -> str:
    """Return the name of the image column.

    If `wanted` is a column name, this name is returned. If `wanted` is "auto", the only image column is returned.

    Raises ConfigError if there is no column `wanted`, or if "auto" finds no image column or several. The message
    contains `where` (the name of the table) and the names of all columns.
    """
    if wanted != AUTO:
        return _named(columns, wanted, key="dataset.image", where=where)
    found = [name for name, column in columns.items() if column.image]
    if len(found) == 1:
        return found[0]
    problem = f"has several image columns ({', '.join(found)})" if found else "has no column that is known to be images"
    raise ConfigError(
        f"{where} {problem}: choose one with dataset.image. Its columns: {', '.join(columns) or '(none)'}"
    )


def label_column(columns: Mapping[str, Column], wanted: str | None, *, where: str) -> str | None:
    """Return the name of the label column, or None if there are no labels.

    If `wanted` is a column name, this name is returned. If `wanted` is "auto", the column with a name in `LABEL_NAMES`
    is returned. If there is no such column, the column for which the table stores class names is returned. If `wanted`
    is None, None is returned.

    Raises ConfigError if there is no column `wanted`, or if "auto" finds several columns. The message contains `where`
    (the name of the table) and the columns.
    """
    if wanted is None:
        return None
    if wanted != AUTO:
        return _named(columns, wanted, key="dataset.label", where=where)
    named = [name for name in LABEL_NAMES if name in columns]
    found = named or [name for name, column in columns.items() if column.classes]
    if len(found) > 1:
        raise ConfigError(
            f"{where} has several columns that may be the label: set dataset.label to {' or '.join(found)}, or to "
            "null for none"
        )
    return found[0] if found else None


def _named(columns: Mapping[str, Column], wanted: str, *, key: str, where: str) -> str:
    if wanted in columns:
        return wanted
    raise ConfigError(
        f"{key} is {wanted!r}, but {where} has no such column.{nearest(wanted, columns)} "
        f"Its columns: {', '.join(columns) or '(none)'}"
    )
