"""The composed configuration of every recipe has the official values, or a reason for each other value."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser

import recipes_table as table
from sslcli.cli.compose import checked_jobs

NAMES = sorted(path.stem for path in table.RECIPES.glob("*.yaml"))
TABLES = table.tables()
config_of = lru_cache(table.composed)


def test_every_recipe_has_a_table() -> None:
    assert sorted(TABLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_differs_has_a_reason_and_an_equal_value_has_none(name: str) -> None:
    for row in table.rows(TABLES[name], config_of(name)):
        assert row.is_equal == (row.reason == ""), row
        assert row.source or row.official == table.NO_VALUE, f"{row.key} has an official value without a source"


@pytest.mark.parametrize("name", NAMES)
def test_a_table_lists_every_key_that_the_recipe_sets(name: str) -> None:
    assert [key for key in table.keys_of(name, config_of(name)) if key not in TABLES[name]["rows"]] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "view_study"])
def test_a_recipe_pretrains_on_all_training_images(name: str) -> None:
    assert config_of(name)["dataset"]["pretrain_on_val"] is True


@pytest.mark.parametrize("name", NAMES)
def test_a_published_number_says_how_it_was_measured(name: str) -> None:
    published = TABLES[name]["published"]
    assert published.startswith(("none", "about")) or published[0].isdigit()
    assert ("evaluate" in TABLES[name]) == (not published.startswith("none"))
    if "evaluate" in TABLES[name]:
        command, *words = TABLES[name]["evaluate"].split()
        assert command == "ssl-eval"
        assert len(checked_jobs("eval", get_args_parser().parse_args(words))) == 1
        assert any(word in published for word in ("k-NN", "linear probe", "linear classifier", "MLP", "fine-tun"))
        assert " images" in published


def test_the_page_is_the_one_that_the_tables_make() -> None:
    assert table.PAGE.read_text() == table.page(), "run: python scripts/recipes_table.py"


def config(**changes: Any) -> dict[str, Any]:
    train = {"batch_size": 128, "lr_scaling": "linear", "epochs": 3}
    views = {"views": [{"crop_scale": [0.2, 1.0]}]}
    return {"train": train, "views": views, "optimizer": {"lr": 0.12}, "_choices_": {"optimizer": "sgd"}} | changes


def test_the_learning_rate_is_the_effective_one() -> None:
    assert table.value_of(config(), table.RATE) == pytest.approx(0.06)
    assert table.value_of(config(), "optimizer") == "sgd"
    with pytest.raises(KeyError):
        table.value_of(config(), "train.epoch")


def test_views_are_compared_with_their_defaults() -> None:
    entry = {"rows": {"views.0": [{"crop_scale": [0.2, 1], "flip": 0.5}, "code"]}}
    (row,) = table.rows(entry, config())
    assert row.is_equal
    (row,) = table.rows({"rows": {"views.0": [{"crop_scale": [0.2, 1], "flip": 0.4}, "code", "why"]}}, config())
    assert not row.is_equal
    assert row.reason == "why"


def test_a_key_without_an_official_value_is_never_equal() -> None:
    (row,) = table.rows({"rows": {"train.epochs": [table.NO_VALUE, "", "ours"]}}, config())
    assert not row.is_equal


def test_values_are_written_as_in_the_yaml_files() -> None:
    found = [table.text_of(value) for value in (None, True, 5e-4, [0.1, 2], "sgd", 128)]
    assert found == ["null", "true", "0.0005", "[0.1, 2]", "sgd", "128"]
    view = table.parse(0, {"interpolation": "bicubic", "blur": 0.5, "blur_kernel": 13})
    assert "bicubic" in table.text_of(view)
    assert table.text_of(view).endswith("kernel of 13 px")
