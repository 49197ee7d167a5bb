"""Labels of Hugging Face datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from small_shards import number_at, png
from sslcli.data.sources.hf import Hf
from sslcli.errors import ConfigError


def named(names: list[str], count: int, *, first: int = 0) -> datasets.Dataset:
    """Images of these classes in turn."""
    columns = {
        "image": [{"bytes": png(first + i), "path": None} for i in range(count)],
        "label": [i % len(names) for i in range(count)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(columns, features=features)


def classes_of(source: Hf, split: str) -> list[str]:
    return [source.classes[number] for number in source.labels[source.splits[split]].tolist()]


@pytest.mark.parametrize("form", ["save_to_disk", "parquet"])
def test_splits_with_other_class_lists_are_merged_by_name(tmp_path: Path, form: str) -> None:
    parts = {"train": named(["a", "b", "c"], 30), "test": named(["c", "b"], 4, first=30)}
    if form == "parquet":
        for name, part in parts.items():
            part.to_parquet(tmp_path / "set" / f"{name}-00000-of-00001.parquet")
    else:
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    source = Hf(path=str(tmp_path / "set"), test="test", image_size=8, val_fraction=0.0)
    assert source.classes == ["a", "b", "c"]
    assert classes_of(source, "train") == ["a", "b", "c"] * 10
    assert classes_of(source, "test") == ["c", "b", "c", "b"]


def test_files_of_one_split_with_other_class_lists_are_merged_by_name(tmp_path: Path) -> None:
    named(["a", "b", "c"], 3).to_parquet(tmp_path / "set" / "train-00000-of-00002.parquet")
    named(["c", "d"], 4, first=3).to_parquet(tmp_path / "set" / "train-00001-of-00002.parquet")
    source = Hf(path=str(tmp_path / "set"), image_size=8, val_fraction=0.0)
    assert source.classes == ["a", "b", "c", "d"]
    assert classes_of(source, "train") == ["a", "b", "c", "c", "d", "c", "d"]
    assert [number_at(source, i) for i in range(7)] == list(range(7))


def test_a_test_class_that_the_training_split_lacks_is_refused(tmp_path: Path) -> None:
    parts = {"train": named(["a", "b"], 10), "test": named(["b", "x"], 4, first=10)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"the split 'test' of .* images of the classes x, which the training"):
        Hf(path=str(tmp_path / "set"), test="test", image_size=8)


def test_class_numbers_beside_class_names_are_refused(tmp_path: Path) -> None:
    plain = {"image": [png(i) for i in range(4)], "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(plain).to_parquet(tmp_path / "set" / "test-00000-of-00001.parquet")
    named(["a", "b"], 10).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    with pytest.raises(
        ConfigError, match=r"test-\S+ contains class numbers without names \(0, \.\.\.\), but .*train-\S+ "
    ):
        Hf(path=str(tmp_path / "set"), test="test", image_size=8)


def test_a_test_split_without_the_label_column_is_named(tmp_path: Path) -> None:
    parts = {"train": named(["a", "b"], 10), "test": named(["a", "b"], 4).remove_columns("label")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"dataset\.label is 'label', but the split 'test' of .* no such column"):
        Hf(path=str(tmp_path / "set"), test="test", image_size=8)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([[0, 1], [1], [0], [1]], r"column 'label' of .* contains \[0, 1\], a list, but an image has one label"),
        ([{"id": 1}] * 4, "a dict, but an image has one label"),
        ([0.37, 0.5, 1.0, 2.0], "seems to be a regression target and not a class label"),
    ],
)
def test_cells_that_are_no_class_labels_name_the_column(tmp_path: Path, cells: list[Any], message: str) -> None:
    columns = {"image": [png(i) for i in range(4)], "label": cells}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match=message):
        Hf(path=str(tmp_path / "set"), image_size=8)
    assert not Hf(path=str(tmp_path / "set"), label=None, image_size=8).has_labels


def test_floats_and_missing_cells_are_whole_numbers_and_unknown(tmp_path: Path) -> None:
    columns = {"image": [png(i) for i in range(5)], "label": [3.0, None, float("nan"), -1.0, 10.0]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "x.parquet")
    source = Hf(path=str(tmp_path / "x.parquet"), image_size=8, val_fraction=0.0)
    assert source.classes == ["3", "10"]
    assert source.labels.tolist() == [0, -1, -1, -1, 1]
