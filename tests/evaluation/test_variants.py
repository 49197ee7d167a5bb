"""Suffixes of result names from settings, and their defaults in the yaml files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sslcli.evaluation.attentive import Attentive
from sslcli.evaluation.base import Protocol
from sslcli.evaluation.distill import Distill
from sslcli.evaluation.finetune import Finetune
from sslcli.evaluation.linear import Linear
from sslcli.evaluation.linear_sgd import LinearSgd
from sslcli.evaluation.semi import Semi
from sslcli.evaluation.utility import Utility
from sslcli.evaluation.variants import join_parts, suffix, written


def test_parts_that_are_empty_are_left_out() -> None:
    assert join_parts("knn", "", "step-5") == "knn_step-5"
    assert join_parts("", "") == ""


def test_only_settings_with_another_value_are_named_in_order() -> None:
    settings = SimpleNamespace(steps=1000, warm_start=True, seed=0, lr=0.1)
    assert suffix(settings, {"steps": 350, "warm_start": False, "seed": 0}) == "steps-1000_warm-start"
    assert suffix(settings, {"seed": 0}) == ""


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("steps", 1000, "steps-1000"),
        ("lr", 0.1, "lr-0.1"),
        ("crop_scale", [0.5, 1.0], "crop-scale-0.5-1"),
        ("crop_scale", (0.5, 1.0), "crop-scale-0.5-1"),
        ("crop_scale", None, "crop-scale-none"),
        ("warm_start", True, "warm-start"),
        ("warm_start", False, "no-warm-start"),
        ("batch_norm", "eval", "batch-norm-eval"),
        ("feature_norm", "batch_norm", "feature-norm-batch-norm"),
    ],
)
def test_how_a_setting_is_written(name: str, value: object, text: str) -> None:
    assert written(name, value) == text


PROTOCOLS = {
    "linear": Linear,
    "linear_sgd": LinearSgd,
    "attentive": Attentive,
    "finetune": Finetune,
    "semi": Semi,
    "distill": Distill,
    "utility": Utility,
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_defaults_are_those_of_the_yaml_file(name: str) -> None:
    settings = yaml.safe_load((Path(__file__).parents[2] / f"conf/protocol/{name}.yaml").read_text())
    named = PROTOCOLS[name].named
    expected = {key: settings[key] for key in named}
    if name == "utility":
        assert expected.pop("inversion") == "linear"
        named = {key: value for key, value in named.items() if key != "inversion"}
    assert expected == named


OTHER: dict[str, Any] = {"steps": 7, "batch_norm": "eval", "seed": 2}


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        (Linear(seed=2, lrs=[1.0], solver="lbfgs"), "seed-2"),
        (Finetune(**OTHER, lrs=[0.5], warm_start=True), "steps-7_warm-start_batch-norm-eval_seed-2"),
        (Semi(**OTHER, seeds=5), "1pct_seeds-5_seed-2_steps-7_batch-norm-eval"),
        (Semi(labels_per_class=4, steps=150), "4-per-class"),
        (Distill(**OTHER, alpha=0.5, lr=1.0), "alpha-0.5_steps-7_batch-norm-eval_seed-2"),
        (Utility(steps=100, seeds=5, points=8), "8-points_seeds-5"),
    ],
)
def test_settings_that_change_the_quantity_are_in_the_name(protocol: Protocol, name: str) -> None:
    assert protocol.variant({}) == name
