"""List of the files of a dataset, and datasets of files."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from sslcli.data.sources.listing import Files, Listing


def filled(pool: Listing, test: Listing | None = None, held_out: list[bool] | None = None, **options: float) -> Files:
    source = Files(image_size=8, val_fraction=0.5)
    source.fill(pool, test or Listing(), name="x", roots=["r", "s"], classes=["a", "b"], held_out=held_out)
    return source


def listing(count: int) -> Listing:
    found = Listing()
    for number in range(count):
        found.add([f"{number}.png"], label=number % 2, root=number % 2)
    return found


def test_files_are_sorted_by_name_then_by_root() -> None:
    found = Listing()
    found.add(["b", "a"], label=0, root=1)
    found.add(["a", "c"], label=1, root=0)
    found.sort()
    assert (found.names, found.roots, found.labels) == (["a", "a", "b", "c"], [0, 1, 1, 0], [1, 0, 0, 1])


def test_names_of_any_bytes_keep_their_root() -> None:
    found = Listing()
    found.add([os.fsdecode(b"caf\xe9.png"), "ü/x.png", ""], label=-1, root=1)
    source = filled(found)
    assert [source.relative(i) for i in range(3)] == found.names
    assert source.path(1) == os.path.join("s", "ü/x.png")
    assert next(iter(source.file_names())) == b"1:caf\xe9.png"


def test_a_fraction_is_held_out_unless_the_files_to_hold_out_are_given() -> None:
    assert len(filled(listing(20)).splits["val"]) == 10
    given = [number in (3, 4, 9) for number in range(20)]
    source = filled(listing(20), listing(2), given)
    assert source.splits["val"].tolist() == [3, 4, 9]
    assert source.splits["train"].tolist() == [number for number in range(20) if not given[number]]
    assert source.splits["test"].tolist() == [20, 21]


def test_held_out_files_without_a_label_are_in_no_split() -> None:
    found = listing(4)
    found.labels[1] = -1
    source = filled(found, held_out=[False, True, True, False])
    assert {name: part.tolist() for name, part in source.splits.items()} == {"train": [0, 3], "val": [2]}


def test_no_training_file_is_an_error() -> None:
    with pytest.raises(ValueError, match="leaves none of the 2 images for training"):
        filled(listing(2), held_out=[True, True])


def test_the_files_survive_pickling(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(filled(listing(5))))
    assert source.path(4) == os.path.join("r", "4.png")
    assert torch.equal(source.labels, torch.tensor([0, 1, 0, 1, 0]))
