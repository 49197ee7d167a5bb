"""Labels of the tables that Hugging Face `datasets` reads, with the class names of every file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sslcli.data.sources.columns import AUTO, columns_of, label_column
from sslcli.data.sources.labels import Labels
from sslcli.errors import ConfigError


def labels_of(
    tables: Sequence[Any],
    wanted: str | None,
    *,
    names: Sequence[str | None],
    where: str,
    path: str,
    options: Mapping[str, Any],
) -> list[Labels]:
    """The labels of the training split and, if there are two tables, of the test split.

    Args:
        tables: `datasets.Dataset`, one per split; names: of the splits.
        wanted: the column, "auto" or None, as `Hf` takes it.
        where: the set, for messages; path, options: what `datasets.load_dataset` read.

    Raises ConfigError for a column that is absent from one of the splits.
    """
    parts: list[Labels] = []
    files: Mapping[str, Sequence[str]] = {}
    for number, (table, split) in enumerate(zip(tables, names, strict=False)):
        columns = columns_of(table.features.arrow_schema)
        name = label_column(columns, wanted, where=f"the split {split!r} of {where}")
        if number == 0 and name is not None:
            wanted, files = name, parquet_files(path, options)
        if number > 0 and wanted == AUTO and name is not None:
            name = None  # the training split has no labels that a probe could learn from
        is_test = number > 0
        if name is None:
            parts.append(Labels([None] * len(table), (), where, is_test=is_test))
            continue
        of_files = [
            labels_of_file(file, name, where=f"column {name!r} of {file}", is_test=is_test)
            for file in files.get(str(split), ())
        ]
        if sum(len(part.values) for part in of_files) == len(table):
            parts += of_files
        else:
            told = f"column {name!r} of the split {split!r} of {where}"
            parts.append(Labels(whole_column(table, name), columns[name].classes, told, is_test=is_test))
    return parts


def parquet_files(path: str, options: Mapping[str, Any]) -> dict[str, list[str]]:
    """The local parquet files of each split, in order; {} if the set is something else.

    `datasets` reads all files with the class names of the first one and takes over the numbers of the others, so only
    the files themselves tell what their numbers mean.
    """
    import datasets

    if not os.path.exists(path) or any(
        os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")
    ):
        return {}
    if os.path.isfile(path):
        return {"train": [path]} if path.endswith(".parquet") else {}
    builder = datasets.load_dataset_builder(path, **options)
    files = {str(split): list(map(str, found)) for split, found in (builder.config.data_files or {}).items()}
    is_local = all(file.endswith(".parquet") and os.path.isfile(file) for found in files.values() for file in found)
    return files if is_local else {}


def labels_of_file(file: str, name: str, *, where: str, is_test: bool) -> Labels:
    """The column `name` of a parquet file, with the class names that the file itself holds."""
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file)
    columns = columns_of(parquet.schema_arrow)
    if name not in columns:
        raise ConfigError(
            f"{file} has no column {name!r}, which the other files of the set have as the label: add it, or set "
            "dataset.label=null"
        )
    values = parquet.read(columns=[name]).column(0).to_pylist()
    return Labels(values, columns[name].classes, where, is_test=is_test)


def whole_column(table: Any, name: str) -> list[Any]:
    """All values of a column, nothing decoded."""
    values: list[Any] = table.select_columns([name]).with_format("arrow")[:].column(0).to_pylist()
    return values
