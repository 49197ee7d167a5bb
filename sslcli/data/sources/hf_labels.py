"""Labels of Hugging Face datasets. The class numbers in a file are matched to the class names in the same file."""

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
    """Return the labels of the training split. If there are two tables, also return the labels of the test split.

    If a split consists of local parquet files, its labels are returned as one `Labels` object per file, because the
    class names may differ between files. Otherwise, they are returned as one object.

    Args:
        tables: one or two splits, each a `datasets.Dataset`.
        wanted: the argument `label` of `Hf`: the name of the label column, "auto" or None.
        names: the names of the splits.
        where: the name of the dataset, for messages.
        path, options: the arguments of `datasets.load_dataset`.

    Raises ConfigError if a split lacks the label column.
    """
    parts: list[Labels] = []
    files: Mapping[str, Sequence[str]] = {}
    for number, (table, split) in enumerate(zip(tables, names, strict=False)):
        columns = columns_of(table.features.arrow_schema)
        name = label_column(columns, wanted, where=f"the split {split!r} of {where}")
        if number == 0 and name is not None:
            wanted, files = name, parquet_files(path, options)
        if number > 0 and wanted == AUTO and name is not None:
            name = None  # a probe cannot be trained without training labels, so test labels are ignored
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
            column = f"column {name!r} of the split {split!r} of {where}"
            parts.append(Labels(whole_column(table, name), columns[name].classes, column, is_test=is_test))
    return parts


def parquet_files(path: str, options: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the local parquet files of each split, in the order in which `datasets` reads them.

    If the dataset is not local or has another format, return {}.

    The library `datasets` applies the class names of the first file to the class numbers of all files. Therefore, the
    class names of each file must be read from the file itself.

    path, options: the arguments of `datasets.load_dataset`.
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
    """Return the labels in the column `name` of a parquet file, with the class names stored in the file.

    where: text that names the column, for messages.
    is_test: whether the file belongs to the official test split.

    Raises ConfigError if the file has no column `name`.
    """
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file)
    columns = columns_of(parquet.schema_arrow)
    if name not in columns:
        raise ConfigError(
            f"{file} has no column {name!r}, which is the label in the other files of the dataset: add it, or set "
            "dataset.label=null"
        )
    values = parquet.read(columns=[name]).column(0).to_pylist()
    return Labels(values, columns[name].classes, where, is_test=is_test)


def whole_column(table: Any, name: str) -> list[Any]:
    """Return all values of a column, without decoding images."""
    values: list[Any] = table.select_columns([name]).with_format("arrow")[:].column(0).to_pylist()
    return values
