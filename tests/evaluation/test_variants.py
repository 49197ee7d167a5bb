"""Suffixes of result names from settings, and their defaults in the yaml files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sslcli.evaluation.linear_sgd import LinearSgd
from sslcli.evaluation.variants import suffix, written


def test_only_settings_with_another_value_are_named_in_order() -> None:
    settings = SimpleNamespace(steps=1000, warm_start=True, seed=0, lr=0.1)
    assert suffix(settings, {"steps": 350, "warm_start": False, "seed": 0}) == "steps-1000_warm-start"
    assert suffix(settings, {"seed": 0}) == ""


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("steps", 1000, "steps-1000"),
        ("lr", 0.1, "lr-0.1"),
        ("warm_start", True, "warm-start"),
        ("warm_start", False, "no-warm-start"),
        ("batch_norm", "eval", "batch-norm-eval"),
        ("feature_norm", "batch_norm", "feature-norm-batch-norm"),
    ],
)
def test_how_a_setting_is_written(name: str, value: object, text: str) -> None:
    assert written(name, value) == text


@pytest.mark.parametrize(("name", "named"), [("linear_sgd", LinearSgd.named)])
def test_the_defaults_are_those_of_the_yaml_file(name: str, named: dict[str, Any]) -> None:
    settings = yaml.safe_load((Path(__file__).parents[2] / f"conf/protocol/{name}.yaml").read_text())
    assert {key: settings[key] for key in named} == named
