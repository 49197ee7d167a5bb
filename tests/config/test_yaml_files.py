"""Parsing and writing of yaml text."""

from __future__ import annotations

import pytest

from sslcli.config.yaml_files import as_yaml, parse_yaml


def test_values_are_read_as_they_were_written() -> None:
    content = {"a": 1, "b": [1.5, None, True, "1", "x: y & *z"], "c": {"d": "${a}", "e": "???"}, "f": {}}
    assert parse_yaml(as_yaml(content)) == content  # interpolations are not resolved


@pytest.mark.parametrize(
    "text",
    ["a: [1", "a: 1\na: 2\n", "a: \x00", "a: !!python/object/apply:os.getcwd []\n", "a: 1\n b: 2\n", "[" * 100_000],
    ids=["unclosed", "duplicate", "nul", "object", "indentation", "deep"],
)
def test_a_text_that_cannot_be_parsed_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)


def test_aliases_are_replaced_unless_they_expand_without_end() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: *x}}") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    for text in (bomb, "a: &a [*a]\n", "a: &a {b: *a}\n"):
        with pytest.raises(ValueError, match="aliases expand to more than"):
            parse_yaml(text)
