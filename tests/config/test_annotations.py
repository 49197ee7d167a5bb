from __future__ import annotations

from typing import Any

import pytest

from sslcli.config.annotations import fits, words


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [0, -3], [1.0, True, "1", None, [1], {}]),
        ("float", [0, 1.5, -2], [True, "1", None, float("inf"), float("nan"), [1.0]]),
        ("bool", [True, False], [0, 1, "true", None]),
        ("str", ["", "a"], [1, True, None, ["a"]]),
        ("int | None", [None, 3], ["none", 1.5]),
        ("Optional[int]", [None, 3], [1.5]),
        ("typing.Union[int, str]", [3, "a"], [1.5, None]),
        ("'int | None'", [None, 3], ["x"]),
        ("str | int", ["last", 3], [1.5]),
        ("list[float]", [[], [1, 0.5]], [[True], ["a"], 1.0, "ab", None]),
        ("Sequence[Mapping[str, Any] | View]", [[{}], [{"a": 1}]], [[1], {}, 5]),
        ("tuple[float, float]", [[1, 2]], [[1], [1, 2, 3], ["a", 2], 1]),
        ("tuple[int, ...]", [[], [1], [1, 2]], [["a"], 1]),
        ("Mapping[str, float] | None", [None, {"a": 1.0}], [{"a": "b"}, [1.0], 5]),
        ("dict[str, Any]", [{"a": object()}], [[], 5]),
        ("Literal['a', 3]", ["a", 3], ["b", 4]),
        ("float | Tensor", [1.0, {"_target_": "x.Y"}], ["abc", None, [1.0]]),
        ("Any", [None, 1, "a", {}], []),
        ("Root", [None, 1, "a", {}], []),
        ("not python", [1], []),
    ],
)
def test_a_value_fits_what_its_annotation_says(annotation: str, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not fits(value, annotation)] == []
    assert [value for value in bad if fits(value, annotation)] == []


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ("int | None", "an integer or null"),
        ("bool", "true or false"),
        ("list[float]", "a list of finite numbers"),
        ("tuple[float, float]", "a list of 2 finite numbers"),
        ("Sequence[Mapping[str, Any] | View]", "a list of mappings"),
        ("Mapping[str, float] | None", "a mapping to finite numbers or null"),
        ("Literal['sgd', 'lbfgs']", "'sgd' or 'lbfgs'"),
        ("float | Tensor", "a finite number"),
        ("nn.Module", "nn.Module"),
    ],
)
def test_an_annotation_is_told_in_words(annotation: str, said: str) -> None:
    assert words(annotation) == said
