"""Names of results and their datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import Cli
from small_runs import make_folder
from sslcli.data.sources.base import Source
from sslcli.runs.result_name import MAX_SET_NAME, dataset_facts, dataset_name

ENDS = ("_val-in-train", "_limit-20_val-in-train", "_val-in-train_16px")


def test_sets_whose_folders_are_called_alike_have_results_of_their_own(
    trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    line = [f"run={trained}", "protocol=knn", "baselines=false", "dataset=folder", "dataset.workers=0"]
    for parent, change in (("my", 0), ("other", 255)):
        root = make_folder(tmp_path / parent / "train.v2", per_class=15, broken=0)
        for path in sorted(root.glob("*/*.png")):  # files of the same names and sizes in both
            pixels = torch.from_numpy(np.array(Image.open(path))) ^ change
            Image.fromarray(pixels.numpy()).save(path.with_suffix(".bmp"))
            path.unlink()
        for extra in (
            ["dataset.image_size=32"],
            ["dataset.image_size=32", "dataset.limit=20"],
            ["dataset.image_size=16"],
        ):
            ended = cli("ssl-eval", *line, f"dataset.root={root}", *extra)
            assert (ended.code, ended.err) == (0, "")
    found = {path.stem: json.loads(path.read_text()) for path in (trained / "eval").glob("*.json")}
    prints = {one["dataset_version"][:6] for one in found.values()}
    names = (f"knn_train.v2-{digits}{end}" for digits in prints for end in ENDS)
    assert len(prints) == 2
    assert sorted(found) == sorted(names)
    assert {one["image_size"] for name, one in found.items() if name.endswith("_16px")} == {16}
    assert all(name in ended.out for name in found)  # the table has them all


def source_of(*, name: str = "pets", limit: int | None = None, val_fraction: float = 0.1, seed: int = 0) -> Source:
    source = Source(image_size=32, val_fraction=val_fraction, seed=seed)
    source.name, source.limit, source.labels = name, limit, torch.zeros(10, dtype=torch.int64)
    source.fingerprint, source.version = "0123456789", "abcdef123456"
    source.splits = {"train": torch.arange(8), "val": torch.arange(8, 10)}
    return source


@pytest.mark.parametrize(
    ("changes", "image_size", "expected"),
    [
        ({}, 32, "pets-abcdef"),
        ({"limit": 50}, 32, "pets-abcdef_limit-50"),
        ({"val_fraction": 0.25}, 32, "pets-abcdef_val-0.25"),
        ({"seed": 3}, 32, "pets-abcdef_seed-3"),
        ({}, 64, "pets-abcdef_32px"),
        ({}, None, "pets-abcdef_32px"),
        ({"limit": 5, "seed": 1}, 64, "pets-abcdef_limit-5_seed-1_32px"),
        ({"name": "my/pets: 2"}, 32, "my-pets-2-abcdef"),
    ],
)
def test_what_differs_from_the_default_is_in_the_name(changes: dict[str, Any], image_size: int, expected: str) -> None:
    assert dataset_name(source_of(**changes), image_size=image_size) == expected


def test_images_of_val_that_are_also_in_train_are_in_the_name() -> None:
    source = source_of(limit=8)
    source.splits["train"] = torch.arange(10)
    assert dataset_name(source, image_size=64) == "pets-abcdef_limit-8_val-in-train_32px"
    source.splits["val"] = torch.arange(0)
    assert dataset_name(source, image_size=32) == "pets-abcdef_limit-8"


def test_a_long_name_fits_into_a_file_name() -> None:
    found = dataset_name(source_of(name="\u732b" * 300), image_size=32)
    assert found == "\u732b" * MAX_SET_NAME + "-abcdef"
    assert len(found.encode()) < 200


def test_the_result_file_identifies_the_image_set() -> None:
    facts = dataset_facts(source_of(limit=5))
    assert facts == {
        "dataset": "pets",
        "dataset_fingerprint": "0123456789",
        "dataset_version": "abcdef123456",
        "dataset_limit": 5,
        "val_fraction": 0.1,
        "pretrain_on_val": False,
        "split_seed": 0,
        "image_size": 32,
    }
