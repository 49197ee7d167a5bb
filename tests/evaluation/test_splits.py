"""Splits on which nothing can be reported are rejected before any feature is computed, with the remedy of the cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from small_runs import make_folder
from sslcli.data.sources.base import Source
from sslcli.data.sources.files import Folder
from sslcli.errors import ConfigError
from sslcli.evaluation.splits import (
    check_answers,
    check_readable,
    check_reported,
    unanswerable,
    whole_training_set,
    why_not_held_out,
)


def positions(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def source_of(labels: list[int], *, num_test: int = 0, kind: type[Source] = Source, **options: float) -> Source:
    """Return a source in memory with black images of these labels; the last `num_test` are the test split."""
    source = kind(image_size=8, **options)  # type: ignore[arg-type]
    source.labels, source.classes, source.name = torch.tensor(labels), list("abcd"), "set"
    source.images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    num_pool = len(labels) - num_test
    source.split(torch.arange(num_pool), labeled=source.labels[:num_pool] >= 0, num_test=num_test)
    return source


class WithTest(Source):
    """A source with the setting `test`."""

    def __init__(self, *, test: str | None = None, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]


@pytest.mark.parametrize("pretrain_on_val", [False, True])
def test_the_whole_training_set_has_val_unless_it_is_reported(pretrain_on_val: bool) -> None:
    source = source_of([0, 1] * 10, num_test=4, val_fraction=0.25, pretrain_on_val=pretrain_on_val)
    val = set(source.splits["val"].tolist())
    assert len(val) == 4
    assert whole_training_set(source, ["test"]).tolist() == list(range(16))
    assert set(whole_training_set(source, ["val"]).tolist()) == set(range(16)) - val


def report(source: Source) -> None:
    check_reported(source, ["test" if "test" in source.splits else "val"], source.splits["train"])


def test_only_images_with_a_label_count() -> None:
    source = Source(image_size=8)
    source.labels, source.classes = torch.tensor([0, 1, -1, 2, 2, 3, -1]), list("abcd")

    def warning_of(bank: list[int], queries: list[int]) -> str | None:
        return unanswerable(source, positions(bank), positions(queries))

    def positions(rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64)

    assert warning_of([0, 1], [0, 1, 6]) is None
    assert "3 of 4 have classes" in str(warning_of([0, 1, 2], [0, 3, 4, 5, 6]))
    assert str(warning_of([0, 1, 2], [0, 3, 4, 5, 6])).endswith(": c, d")


def test_test_images_without_labels_are_rejected_with_the_key_of_the_test_split() -> None:
    with pytest.raises(ConfigError, match=r"none of the 2 images of test of set has a label.* choose a labeled"):
        report(source_of([0, 1] * 10 + [-1, -1], num_test=2))
    with pytest.raises(ConfigError, match=r"set dataset.test to labeled images, or to null"):
        report(source_of([0, 1] * 10 + [-1, -1], num_test=2, kind=WithTest))


@pytest.mark.parametrize(
    ("labels", "fraction", "reason"),
    [
        ([0, 1] * 10, 0.001, "0.001 of 20 labeled images is 0.02, which is rounded to 0: .* to at least 0.05"),
        ([0, 1] * 10, 0.0, "dataset.val_fraction is 0: set it above 0"),
        ([-1] * 20, 0.1, "the training images have no labels"),
    ],
)
def test_the_reason_why_nothing_is_held_out_is_stated(labels: list[int], fraction: float, reason: str) -> None:
    source = source_of(labels, val_fraction=fraction)
    with pytest.raises(ConfigError, match=f"no images of set are held out to report on: .*{reason}"):
        report(source)


def test_the_advised_fraction_holds_out_an_image() -> None:
    labels = [0, 1] * 10
    advised = float(why_not_held_out(source_of(labels, val_fraction=0.001)).rpartition(" ")[2])
    assert len(source_of(labels, val_fraction=advised).splits["val"]) == 1


def test_classes_that_no_training_image_has_are_rejected_and_a_small_limit_is_named() -> None:
    source = source_of([0, 1] * 10 + [2, 3], num_test=2)
    with pytest.raises(ConfigError, match=r"none of the 2 labeled images of test .* add training images of these"):
        report(source)
    with pytest.raises(ConfigError, match=r"increase dataset.limit, which is 2"):
        report(source_of([0, 1] * 10 + [2, 3], num_test=2, limit=2))
    report(source_of([0, 1] * 10 + [2, 1], num_test=2))


def test_a_limit_that_leaves_one_class_is_named() -> None:
    with pytest.raises(ConfigError, match=r"dataset.limit is 1, which may leave out the other classes: increase it"):
        check_answers(source_of([0, 1] * 10, limit=1), positions(0))
    with pytest.raises(ConfigError, match=r"a probe needs two classes or more$"):
        check_answers(source_of([0, 1] * 10), positions(0, 2))


def test_one_readable_image_is_enough(tmp_path: Path) -> None:
    source = Folder(root=make_folder(tmp_path, per_class=3, broken=3), image_size=8)
    broken = positions(*[i for i in range(6) if "/a/" in source.path(i)])
    check_readable(source, torch.arange(6), "val")
    with pytest.raises(ConfigError, match=r"none of the 3 images of val .* or set dataset.val_fraction=0"):
        check_readable(source, broken, "val")
