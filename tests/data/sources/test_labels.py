"""Conversion of labels to class numbers, and invalid labels."""

from __future__ import annotations

import datetime
import warnings
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sslcli.data.sources.labels import Labels, as_labels, plain_label
from sslcli.errors import ConfigError

ABC = ("a", "b", "c")


def labels(*values: Any, classes: tuple[str, ...] = ()) -> tuple[list[int], list[str]]:
    found, names = as_labels([Labels(values, classes, "here")])
    assert found.dtype == torch.int64
    return found.tolist(), names


def merged(*parts: tuple[list[Any], tuple[str, ...]], tests: int = 0) -> tuple[list[int], list[str]]:
    """Return the labels of several parts; the last `tests` parts are the official test split."""
    train = len(parts) - tests
    found, names = as_labels([Labels(*part, f"part {i}", is_test=i >= train) for i, part in enumerate(parts)])
    return found.tolist(), names


def test_labels_become_numbers() -> None:
    assert labels(2, 0, None, -1, classes=ABC) == ([2, 0, -1, -1], ["a", "b", "c"])
    assert labels("b", "", "a", classes=("a", "b")) == ([1, -1, 0], ["a", "b"])
    assert labels(10, 9, 200, "-1") == ([1, 0, 2, -1], ["9", "10", "200"])
    assert labels("10", "9", "x") == ([0, 1, 2], ["10", "9", "x"])
    assert labels("007", "010") == ([0, 1], ["007", "010"])
    assert labels("2", "0", classes=ABC) == ([2, 0], ["a", "b", "c"])
    assert labels(None, None) == ([-1, -1], [])
    assert labels() == ([], [])
    assert labels(0, 1, classes=("x", "x")) == ([0, 1], ["x", "x"])


@pytest.mark.parametrize(
    "unknown",
    [None, "", " ", "nan", "NaN", "None", "null", -1, -1.0, "-1", "-1.0", float("nan"), np.float32("nan"), b"", b"-1"],
)
def test_unknown_labels(unknown: Any) -> None:
    assert labels("a", unknown, "b") == ([0, -1, 1], ["a", "b"])
    assert labels(4, unknown, 5) == ([0, -1, 1], ["4", "5"])
    assert labels(1, unknown, classes=ABC) == ([1, -1], list(ABC))


def test_a_class_that_is_named_like_an_unknown_label_is_a_class() -> None:
    assert labels(0, 1, "None", classes=("dent", "None")) == ([0, 1, 1], ["dent", "None"])


@pytest.mark.parametrize(
    "three", [3, 3.0, "3", "3.0", b"3", np.int64(3), np.float64(3), np.array(3), torch.tensor(3), Decimal(3), "+3"]
)
def test_whole_numbers_of_every_type_are_one_class(three: Any) -> None:
    assert labels(three, 10, 3) == ([0, 1, 0], ["3", "10"])
    assert labels(three, classes=("a", "b", "c", "d")) == ([3], ["a", "b", "c", "d"])


def test_scalars_of_arrow_booleans_and_text() -> None:
    assert labels(*pa.array([3, None, 1])) == ([1, -1, 0], ["1", "3"])
    assert labels(True, False, None) == ([1, 0, -1], ["False", "True"])
    assert labels(True, False, classes=("no", "yes")) == ([1, 0], ["no", "yes"])
    assert labels(" cat", "cat ", "dog") == ([0, 0, 1], ["cat", "dog"])


@pytest.mark.parametrize(
    "values", [[0.37, 1.0], ["0.37", "1"], ["1.5e-3"], [float("inf")], ["inf", "2"], [Decimal("0.5")]]
)
def test_regression_targets_are_refused(values: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"here contains .* seems to be a regression target .* dataset\.label"):
        labels(*values)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"contains \[1, 2\], a list, but an image has one label"),
        ((1, 2), "a tuple, but an image has one label"),
        ({"id": 1}, "a dict, but an image has one label"),
        ({1}, "a set, but an image has one label"),
        (np.array([1, 2]), "a ndarray, but an image has one label"),
        (torch.tensor([1]), "a Tensor, but an image has one label"),
        (pa.scalar([1, 2]), "a list, but an image has one label"),
        (datetime.date(2020, 1, 1), "a date, but a label must be text or an integer"),
        (b"\xff", "bytes that are not UTF-8"),
    ],
)
def test_what_is_no_label_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labels(0, value)
    with pytest.raises(ConfigError, match=message):
        plain_label(value, where="here")


def test_numbers_out_of_range_and_ambiguous_spellings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"here contains '3', which is not one of its 3 classes"):
        labels(3, classes=ABC)
    with pytest.raises(ConfigError, match=r"here contains 'd', which is not one of its 3 classes"):
        labels("d", classes=ABC)
    with pytest.raises(ConfigError, match=r"here contains the label -100, but class numbers begin at 0"):
        labels(0, 1, -100)
    with pytest.raises(ConfigError, match=r"'007' and '7', which are the same number written in two ways"):
        labels("7", "007")


def test_parts_are_merged_by_name() -> None:
    assert merged(([0, 1, 2], ABC), ([0, 1], ("b", "c")), tests=1) == ([0, 1, 2, 1, 2], list(ABC))
    assert merged(([0, 1], ("b", "a")), ([0, 1], ("a", "c"))) == ([0, 1, 1, 2], ["b", "a", "c"])
    assert merged(([0, 1], ("a", "b")), (["b", "a"], ()), tests=1) == ([0, 1, 1, 0], ["a", "b"])
    assert merged((["b", "a"], ()), ([0, 1], ("b", "a")), tests=1) == ([1, 0, 1, 0], ["a", "b"])
    assert merged(([0, 1], ("a", "b")), (["z", None], ())) == ([0, 1, 2, -1], ["a", "b", "z"])
    assert merged(([0, 1], ("a", "b")), ([None, -1], ())) == ([0, 1, -1, -1], ["a", "b"])
    assert merged((["b", "a"], ()), (["b"], ()), tests=1) == ([1, 0, 1], ["a", "b"])
    assert merged(([2, 3], ()), ([3], ()), tests=1) == ([0, 1, 1], ["2", "3"])
    assert merged(([None], ()), (["x"], ()), tests=1) == ([-1, 0], ["x"])
    # A name in the list of the test split that no image has is no class of the set.
    assert merged(([0], ("a",)), ([1], ("z", "a")), tests=1) == ([0, 0], ["a"])


@pytest.mark.parametrize(
    ("parts", "tests", "message"),
    [
        (
            [([0, 1], ("a", "b")), ([0, 1], ())],
            0,
            r"part 1 contains class numbers without names \(0, .* part 0 has class names",
        ),
        (
            [([0, 1], ("a", "b")), ([0, 1], ())],
            1,
            r"part 1 contains class numbers without names \(0, .* part 0 has class names",
        ),
        (
            [([0, 1], ()), ([0, 1], ("a", "b"))],
            1,
            r"part 0 contains class numbers without names \(0, .* part 1 has class names",
        ),
        ([(["0", "1"], ()), ([0, 1], ("a", "b"))], 1, r"part 0 contains class numbers without names"),
        (
            [([0, 1], ()), (["a", "b"], ())],
            0,
            r"part 0 contains class numbers, but part 1 contains class names \(a, b\)",
        ),
        ([([0], ("a", "b")), ([1], ("a", "x"))], 1, r"part 1 has images of the classes x, which the training images"),
        ([([0], ("a", "b")), (["x"], ())], 1, r"part 1 has images of the classes x, which the training images"),
        ([([0, 1], ()), ([2], ())], 1, r"part 1 has images of the classes 2, which .* \(their classes: 0, 1\)"),
        ([(["a"], ()), (["b"], ())], 1, r"part 1 has images of the classes b"),
        ([([0], ("a", "a")), ([0], ("a",))], 1, r"part 0 has several classes named 'a'"),
    ],
)
def test_parts_that_cannot_be_merged_are_refused(parts: list[Any], tests: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merged(*parts, tests=tests)


@pytest.mark.parametrize(
    "values", [[f"id_{i}" for i in range(30)], list(range(30)), [str(i // 2) for i in range(39)] + [None] * 50]
)
def test_nearly_as_many_classes_as_images_are_warned_of(values: list[Any]) -> None:
    with pytest.warns(UserWarning, match=r"the column has \d+ classes .* seems to contain regression targets or names"):
        as_labels([Labels(values, (), "the column")])


@pytest.mark.parametrize("values", [list("abcdefghij"), [str(i // 3) for i in range(90)]])
def test_few_classes_and_classes_with_several_images_are_not_warned_of(values: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_labels([Labels(values, (), "the column")])
        as_labels([Labels(range(30), [str(i) for i in range(30)], "classes with names")])


def test_regression_targets_among_a_few_texts_are_refused_and_a_version_is_a_class() -> None:
    with pytest.raises(ConfigError, match=r"contains 0.25, which seems to be a regression target"):
        as_labels([Labels(["0.25", "0.75", "1.5", "?"], (), "the column")])
    assert as_labels([Labels(["a", "b", "2.5", "a"], (), "the column")])[1] == ["2.5", "a", "b"]
