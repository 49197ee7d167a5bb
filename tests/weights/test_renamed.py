"""Names of parameters and buffers of version 0.1."""

from __future__ import annotations

import pytest

from sslcli.weights.renamed import OLDER, current_names, older_names, with_current_names


@pytest.mark.parametrize(("new", "olds"), OLDER.items())
def test_a_name_and_its_older_ones_lead_to_each_other(new: str, olds: tuple[str, ...]) -> None:
    assert list(older_names(f"a.{new}.weight")) == [f"a.{old}.weight" for old in olds]
    for old in olds:
        assert f"a.{new}.weight" in list(current_names(f"a.{old}.weight"))


def test_only_whole_parts_of_a_name_are_renamed() -> None:
    assert list(older_names("my_momentum_head.weight")) == []
    assert list(current_names("key_heads.weight")) == []


def test_entries_get_the_names_that_the_module_wants() -> None:
    state = {"key_backbone.weight": 1, "backbone.weight": 2}
    wanted = ["momentum_backbone.weight", "backbone.weight"]
    assert with_current_names(state, wanted) == {"momentum_backbone.weight": 1, "backbone.weight": 2}


def test_a_module_that_itself_has_the_older_name_keeps_it() -> None:
    state = {"key_head.weight": 1}
    assert with_current_names(state, ["key_head.weight"]) == state
    assert with_current_names(state, ["key_head.weight", "momentum_head.weight"]) == state
    assert with_current_names(state, ["head.weight"]) == state


def test_a_state_that_has_the_current_name_is_unchanged() -> None:
    state = {"momentum_head.weight": 1, "key_head.weight": 2}
    assert with_current_names(state, ["momentum_head.weight"]) == state
