"""File formats of features."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sslcli.errors import ConfigError
from sslcli.runs import embedding_files
from sslcli.runs.embedding import EmbeddedBatch
from sslcli.runs.embedding_files import check_format, readable_path, sidecar, stored_identity, write

PATHS = ["a,b.png", "c\nd.png", os.fsdecode(b"e\xff.png"), "f.png", "g.png"]
ROWS = [["a,b.png", "1", "dog", "train"], ["c\nd.png", "", "", "train"], ["g.png", "0", "cat", "test"]]


class Source:
    labels = torch.tensor([1, -1, 0, 0, 0])
    classes = ("cat", "dog")

    def path(self, position: int) -> str:
        return PATHS[position]

    def __len__(self) -> int:
        return len(PATHS)


class Parts(list[EmbeddedBatch]):
    rows, num_features = 3, 2


@pytest.fixture
def arguments() -> tuple[Any, Any]:
    splits = {"train": torch.tensor([0, 1, 3]), "test": torch.tensor([2, 4])}
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    first, last = np.array([0, 1]), np.array([4])
    parts = Parts([EmbeddedBatch(3, first, features[:2], {"f.png": "x"}), EmbeddedBatch(1, last, features[2:], {})])
    return SimpleNamespace(source=Source(), splits=splits), parts


def test_npy_comes_with_a_table_and_its_provenance(tmp_path: Path, arguments: tuple[Any, Any]) -> None:
    out = tmp_path / "x.npy"
    write(out, *arguments, {"identity": "7"})
    assert np.load(out).tolist() == [[0, 1], [2, 3], [4, 5]]
    with sidecar(out, "csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["path", "label", "class", "split"], *ROWS]
    assert json.loads(sidecar(out, "json").read_text()) == {"identity": "7"}
    assert stored_identity(out) == "7"


def test_parquet_has_the_same_columns_and_features(tmp_path: Path, arguments: tuple[Any, Any]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "x.parquet"
    write(out, *arguments, {"identity": "7"})
    table = parquet.read_table(out)
    assert table["features"].to_pylist() == [[0, 1], [2, 3], [4, 5]]
    found = zip(*(table[name].to_pylist() for name in ("path", "label", "class", "split")), strict=True)
    assert [["" if value is None else str(value) for value in row] for row in found] == ROWS
    assert stored_identity(out) == "7"


def test_other_files_have_no_identity(tmp_path: Path) -> None:
    for name in ("x.npy", "x.parquet"):
        (tmp_path / name).write_bytes(b"something")
        assert stored_identity(tmp_path / name) is None
    assert readable_path(PATHS[2]) == "e\\xff.png"


def test_unknown_formats_and_absent_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"must end in .parquet or .npy"):
        check_format(Path("x.csv"))
    monkeypatch.setattr(embedding_files, "find_spec", lambda name: None)
    check_format(Path("x.npy"))
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        check_format(Path("x.parquet"))
