"""File formats of ssl-embed: parquet, or npy with a table of paths and labels. Both are written part by part."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sslcli.errors import ConfigError
from sslcli.runs.embedding import Embedding
from sslcli.runs.embedding_parts import Parts
from sslcli.system import atomic

METADATA = b"sslcli"  # key of the provenance in the metadata of a parquet file


def check_format(out: Path) -> None:
    """Raise ConfigError unless `out` has a known extension and the package that its format needs is installed."""
    if out.suffix not in (".parquet", ".npy"):
        raise ConfigError(f"out is {out}, but its name must end in .parquet or .npy")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigError(f"out is {out}, which needs pyarrow: pip install pyarrow, or write FILE.npy")


def sidecar(out: Path, extension: str) -> Path:
    """Return the path of a file beside `out`, such as FILE.npy.csv."""
    return out.with_name(f"{out.name}.{extension}")


def stored_identity(out: Path) -> str | None:
    """Return the identity of the features in the file `out`, or None if ssl-embed did not write this file."""
    try:
        if out.suffix == ".npy":
            found = json.loads(sidecar(out, "json").read_text("utf-8"))
        else:
            import pyarrow.parquet

            found = json.loads(pyarrow.parquet.read_schema(out).metadata[METADATA])
        return str(found["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Rows:
    """Columns of consecutive rows: one row per readable image."""

    path: list[str]
    label: NDArray[np.int64]  # -1 = no label
    class_name: list[str]  # "" = no label
    split: list[str]
    features: NDArray[np.float32]


def rows_of(embedding: Embedding, parts: Parts) -> Iterator[Rows]:
    """Yield the rows of each part."""
    source, names = embedding.source, list(embedding.splits)
    split = np.zeros(len(source), np.int8)
    for number, of_split in enumerate(embedding.splits.values()):
        split[of_split.numpy()] = number
    for part in parts:
        positions = part.positions
        label = source.labels[positions].numpy()
        yield Rows(
            path=[readable_path(source.path(position)) for position in positions.tolist()],
            label=label,
            class_name=[source.classes[number] if number >= 0 else "" for number in label.tolist()],
            split=[names[number] for number in split[positions].tolist()],
            features=part.features,
        )


def readable_path(path: str) -> str:
    """Return a path as text that can be encoded as UTF-8. Bytes that are not UTF-8 become escapes such as `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def write(out: Path, embedding: Embedding, parts: Parts, provenance: dict[str, Any]) -> None:
    """Write the features of all parts to `out`. A file appears under its name only when it is complete."""
    if out.suffix == ".parquet":
        atomic.write(out, partial(_write_parquet, embedding, parts, provenance))
        return
    atomic.write(sidecar(out, "csv"), partial(_write_table, embedding, parts))
    atomic.replace(sidecar(out, "json"), json.dumps(provenance, indent=2).encode())
    atomic.write(out, partial(_write_npy, parts))


def _write_parquet(embedding: Embedding, parts: Parts, provenance: dict[str, Any], path: Path) -> None:
    """Write columns path, label, class, split and features, with one row group per part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "path": pa.string(),
        "label": pa.int64(),
        "class": pa.string(),
        "split": pa.string(),
        "features": pa.list_(pa.float32(), parts.num_features),
    }
    schema = pa.schema(columns, metadata={METADATA: json.dumps(provenance)})
    with pq.ParquetWriter(path, schema) as writer:
        for rows in rows_of(embedding, parts):
            unlabeled = rows.label < 0
            arrays = [
                pa.array(rows.path),
                pa.array(rows.label, mask=unlabeled),
                pa.array(rows.class_name, pa.string(), mask=unlabeled),
                pa.array(rows.split),
                pa.FixedSizeListArray.from_arrays(pa.array(rows.features.reshape(-1)), parts.num_features),
            ]
            writer.write_table(pa.table(arrays, schema=schema))


def _write_table(embedding: Embedding, parts: Parts, path: Path) -> None:
    """Write the columns path, label, class and split of a CSV file. Its rows are those of the npy file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "label", "class", "split"])
        for rows in rows_of(embedding, parts):
            label = ["" if number < 0 else number for number in rows.label.tolist()]
            table.writerows(zip(rows.path, label, rows.class_name, rows.split, strict=True))


def _write_npy(parts: Parts, path: Path) -> None:
    """Write the features (rows, d) float32 of all parts."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (parts.rows, parts.num_features)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part.features, "<f4").data)
