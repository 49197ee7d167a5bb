"""Image sets read by Hugging Face `datasets`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from small_shards import KINDS, number_at, png
from sslcli.data.bad_images import BadImage
from sslcli.data.loader import Loader, plain_batches
from sslcli.data.sources.hf import Hf
from sslcli.data.views.views import Views
from sslcli.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def table(count: int, *, first: int = 0, **more: list[Any]) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": png(first + i), "path": None} for i in range(count)],
        "label": [i % 3 for i in range(count)],
        **more,
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=KINDS)}
    features |= {name: datasets.Value("string") for name in more}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def parquet(folder: Path) -> Path:
    """Two files of the training split and one of the test split, as the hub lays them out."""
    (folder / "data").mkdir(parents=True)
    table(20).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    table(10, first=20).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    table(6, first=30).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("blocked", ["home", "home/huggingface/datasets"])
def test_a_cache_that_cannot_be_written_is_named_and_not_the_data(
    blocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).touch()  # a file in the place of a folder: nothing can be written below it, even by root
    cache = tmp_path / "home/huggingface/datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    folder = str(parquet(tmp_path / "animals"))
    expected = rf"the cache of the package datasets, {cache}, cannot be written .*: set dataset\.cache to a writable"
    with pytest.raises(ConfigError, match=expected):
        Hf(path=folder, image_size=8)
    assert len(Hf(path=folder, image_size=8, cache=str(tmp_path / "own")).labels) == 30


def test_a_folder_of_parquet_files_has_its_rows_labels_classes_and_splits(tmp_path: Path) -> None:
    source = Hf(path=str(parquet(tmp_path / "animals")), test="test", image_size=8)
    assert [number_at(source, i) for i in range(36)] == list(range(36))
    assert source.labels.tolist() == [*(i % 3 for i in range(20)), *(i % 3 for i in range(10)), 0, 1, 2, 0, 1, 2]
    assert source.classes == KINDS
    assert source.splits["test"].tolist() == list(range(30, 36))
    assert len(source.splits["val"]) == 3
    assert sorted([*source.splits["train"].tolist(), *source.splits["val"].tolist()]) == list(range(30))
    assert source.images is None
    assert source.path(3) == "animals/train[3]"
    assert source.path(31) == "animals/test[1]"


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": table(9), "held": table(3, first=9)})
    both.save_to_disk(tmp_path / "both")
    source = Hf(path=str(tmp_path / "both"), test="held", image_size=8)
    assert [number_at(source, i) for i in range(12)] == list(range(12))
    table(9).select([8, 0, 4]).save_to_disk(tmp_path / "one")
    source = Hf(path=str(tmp_path / "one"), image_size=8)
    assert [number_at(source, i) for i in range(3)] == [8, 0, 4]
    assert source.labels.tolist() == [2, 0, 1]


def test_a_single_file_and_chosen_files_are_read(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set")
    single = Hf(path=str(folder / "data" / "test-00000-of-00001.parquet"), image_size=8)
    assert number_at(single, 0) == 30
    some = Hf(path=str(folder), data_files="data/train-00001*.parquet", image_size=8)
    assert [number_at(some, i) for i in range(len(some))] == list(range(20, 30))


def test_other_columns_are_chosen_by_name(tmp_path: Path) -> None:
    table(4, kind=["b", "a", "", "b"]).to_parquet(tmp_path / "x.parquet")
    source = Hf(path=str(tmp_path / "x.parquet"), label="kind", image_size=8)
    assert source.classes == ["a", "b"]
    assert source.labels.tolist() == [1, 0, -1, 1]
    assert not Hf(path=str(tmp_path / "x.parquet"), label=None, image_size=8).has_labels
    with pytest.raises(ConfigError, match=r"dataset\.image is 'imge', but .*Did you mean 'image'\?.*label, kind"):
        Hf(path=str(tmp_path / "x.parquet"), image="imge", image_size=8)
    with pytest.raises(ConfigError, match=r"dataset\.label is 'class', but .*no such column"):
        Hf(path=str(tmp_path / "x.parquet"), label="class", image_size=8)


def test_bytes_are_taken_for_images_where_nothing_is_told(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"id": ["a", "b"], "photo": [png(1), png(2)]}).save_to_disk(tmp_path / "set")
    source = Hf(path=str(tmp_path / "set"), image_size=8)
    assert [number_at(source, position) for position in range(2)] == [1, 2]


def test_cells_without_an_image_are_bad_and_replaced(tmp_path: Path) -> None:
    cells: list[Any] = [{"bytes": png(i), "path": None} for i in range(8)]
    cells[2], cells[5] = None, {"bytes": b"<html>", "path": None}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(tmp_path / "set")
    source = Hf(path=str(tmp_path / "set"), image_size=8, max_bad=0.5, val_fraction=0.0)
    with pytest.raises(BadImage, match=r"set/train\[2\]: the cell is empty"):
        source.read(2)
    with pytest.raises(BadImage, match=r"set/train\[5\]: the content has no known image format"):
        source.read(5)
    views = Views([{"count": 1, "crop_scale": None, "flip": 0.0}], normalize=False)
    train_loader = Loader(source, views, batch_size=8, accumulate=1, seed=0, device=torch.device("cpu"))
    ((batch,),) = list(train_loader.steps(0, 1))
    assert train_loader.bad.count == 2
    shown = (batch.views[0][:, 0, 0, 0] * 255).round().int()
    assert sorted(batch.index.tolist()) == list(range(8))
    for index, red in zip(batch.index.tolist(), shown.tolist(), strict=True):
        assert (index == red) == (index not in (2, 5))
    readable = torch.cat([whole for _, whole in plain_batches(source, source.splits["train"], batch_size=3)])
    assert (~readable).nonzero().flatten().tolist() == [2, 5]


def test_paths_in_the_column_are_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    datasets.Dataset.from_dict({"file": [str(tmp_path / "a.png"), "nowhere.png"]}).save_to_disk(tmp_path / "set")
    source = Hf(path=str(tmp_path / "set"), image="file", image_size=8)
    assert number_at(source, 0) == 7
    with pytest.raises(BadImage, match="No such file"):
        source.read(1)


def test_workers_read_the_same(tmp_path: Path) -> None:
    batches = []
    for workers in (0, 2):
        source = Hf(path=str(parquet(tmp_path / f"set{workers}")), image_size=8, workers=workers)
        views = Views([{"count": 2}])
        train_loader = Loader(source, views, batch_size=9, accumulate=1, seed=0, device=torch.device("cpu"))
        batches.append(list(train_loader.steps(0, 6)))
    for (one,), (other,) in zip(*batches, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(torch.stack(one.views), torch.stack(other.views))


def test_the_fingerprint_follows_what_is_in_the_set_and_not_where_it_lies(tmp_path: Path) -> None:
    table(9).save_to_disk(tmp_path / "one")
    table(9).to_parquet(tmp_path / "two.parquet")
    table(9, first=1).save_to_disk(tmp_path / "other")
    first = Hf(path=str(tmp_path / "one"), image_size=8).fingerprint
    assert Hf(path=str(tmp_path / "two.parquet"), image_size=16, limit=3).fingerprint == first
    assert Hf(path=str(tmp_path / "other"), image_size=8).fingerprint != first
    assert pickle.loads(pickle.dumps(Hf(path=str(tmp_path / "one"), image_size=8))).fingerprint == first


def test_a_set_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"somebody/animals, dataset\.name=big.* is not a local folder .*--local-dir DIR"
    ):
        Hf(path="somebody/animals", name="big", image_size=8)
    with pytest.raises(ConfigError, match=r"there is no file or folder .*nowhere"):
        Hf(path=str(tmp_path / "nowhere"), image_size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty cannot be read .*repair it, or change dataset.path"):
        Hf(path=str(tmp_path / "empty"), image_size=8)
    (tmp_path / "a.zip").touch()
    with pytest.raises(ConfigError, match=r"only files that end in \.parquet, \.tar, \.arrow"):
        Hf(path=str(tmp_path / "a.zip"), image_size=8)


def test_a_damaged_file_and_an_unknown_split_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no split 'tset'\. Did you mean 'test'\? Its splits: train, test"):
        Hf(path=str(parquet(tmp_path / "set")), test="tset", image_size=8)
    (tmp_path / "x.parquet").write_bytes((tmp_path / "set/data/test-00000-of-00001.parquet").read_bytes()[:-50])
    with pytest.raises(ConfigError, match=r"x\.parquet cannot be read .*Parquet"):
        Hf(path=str(tmp_path / "x.parquet"), image_size=8)


def test_without_the_package_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install datasets$"):
        Hf(path=str(tmp_path), image_size=8)


def test_one_split_for_training_and_testing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.test is 'train', which is also dataset.split"):
        Hf(path=str(parquet(tmp_path / "animals")), test="train", image_size=8)
