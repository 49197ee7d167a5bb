"""Which column of a table holds the images and which the labels."""

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
    """What a table says of one of its columns.

    Attributes:
        image: whether it holds encoded images.
        classes: the names of the classes it numbers; empty where it does not tell.
    """

    image: bool = False
    classes: tuple[str, ...] = ()


def columns_of(schema: Any) -> dict[str, Column]:
    """The columns of a schema of Arrow by name.

    `datasets` writes into it which are images and what the classes are called. Where it tells of no images, columns of
    bytes, and of a struct that begins with `bytes`, are taken for them.
    """
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    meanings = {name: meaning for name, meaning in told.items() if isinstance(meaning, dict)}
    images = {name for name, meaning in meanings.items() if meaning.get("_type") == "Image"}
    if not images:
        images = {part.name for part in schema if re.match(r"(large_)?binary$|struct<bytes: ", str(part.type))}
    labels = {name: meaning["names"] for name, meaning in meanings.items() if meaning.get("_type") == "ClassLabel"}
    return {part.name: Column(part.name in images, tuple(labels.get(part.name, ()))) for part in schema}


def image_column(columns: Mapping[str, Column], wanted: str, *, where: str) -> str:
    """The column of the images: the one that is `wanted`, or with "auto" the only one that holds images.

    Raises ConfigError, naming `where` they were looked for and the columns there are.
    """
    if wanted != AUTO:
        return _named(columns, wanted, key="dataset.image", where=where)
    found = [name for name, column in columns.items() if column.image]
    if len(found) == 1:
        return found[0]
    told = f"has the columns of images {', '.join(found)}" if found else "has no column that is known to hold images"
    raise ConfigError(f"{where} {told}: choose one with dataset.image. Its columns: {', '.join(columns) or '(none)'}")


def label_column(columns: Mapping[str, Column], wanted: str | None, *, where: str) -> str | None:
    """The column of the labels: the one that is `wanted`, or with "auto" what looks like it; None where there is none.

    Raises ConfigError, naming `where` they were looked for and the columns there are.
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
