"""Every yaml file: it composes, lists all parameters of its class, and combines with every other choice."""

from __future__ import annotations

import itertools
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from sslcli.cli import command as command_module
from sslcli.cli import compose
from sslcli.config.schema import GROUPS
from sslcli.config.settings import (
    EmbedSettings,
    EvalSettings,
    ExportSettings,
    MonitorSettings,
    RunSettings,
    SweepSettings,
    TrainSettings,
)
from sslcli.config.signatures import METHOD_ARGUMENTS, OPTIMIZER_ARGUMENTS, parameters_of

CONF = Path(__file__).parents[2] / "conf"
CHOICES = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and not folder.name.startswith("_")
}
FILES = [f"{group}/{choice}" for group, choices in CHOICES.items() for choice in choices]


def read(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert isinstance(found, dict)
    return found


def node_of(name: str) -> dict[str, Any]:
    """Return the node of a yaml file's own group."""
    found = read(name)
    inner = found.get(name.partition("/")[0])
    return inner if isinstance(inner, dict) else found


def given(name: str) -> list[str]:
    """Return the override that chooses a yaml file, and values for its mandatory keys."""
    group, _, choice = name.partition("/")
    return [f"{group}={choice}", *(f"{group}.{key}=x" for key, value in node_of(name).items() if value == "???")]


def composed(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [f"ssl-{command}", *arguments])
    (job,) = compose.checked_jobs(command, command_module.read_arguments(command))
    return job


def test_the_groups_are_the_folders() -> None:
    assert {group for groups in GROUPS.values() for group in groups} == set(CHOICES)


@pytest.mark.parametrize("name", FILES)
def test_every_yaml_composes_and_is_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "train" if name.partition("/")[0] in GROUPS["train"] else "eval"
    job = composed(monkeypatch, command, *given(name))
    group, _, choice = name.partition("/")
    assert job["_choices_"][group] == choice


@pytest.mark.parametrize("name", [name for name in FILES if "_target_" in node_of(name)])
def test_a_yaml_shows_every_keyword_of_its_class(name: str) -> None:
    node = node_of(name)
    parameters = parameters_of(node["_target_"])
    assert parameters is not None
    if node["_target_"].startswith("sslcli."):
        injected = {"method": METHOD_ARGUMENTS, "optimizer": OPTIMIZER_ARGUMENTS}.get(name.partition("/")[0], ())
        assert set(node) - {"_target_", "defaults"} == set(parameters) - set(injected)
    else:
        assert set(node) - {"_target_"} <= set(parameters)


@pytest.mark.parametrize("name", FILES)
def test_a_yaml_begins_with_a_comment_on_what_it_is(name: str) -> None:
    lines = [line for line in (CONF / f"{name}.yaml").read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith("# ") or any("#" in line for line in lines)


def test_train_yaml_holds_the_settings_and_nothing_else() -> None:
    found = read("train")
    assert list(found["train"]) == [field.name for field in fields(TrainSettings)]
    assert list(found["sweep"]) == [field.name for field in fields(SweepSettings)]
    assert list(read("monitor/default")) == [field.name for field in fields(MonitorSettings)]
    assert set(found) - {"defaults", "hydra", "train", "sweep"} == {field.name for field in fields(RunSettings)}


def test_eval_yaml_holds_the_settings_and_nothing_else() -> None:
    assert set(read("eval")) - {"defaults", "hydra"} == {field.name for field in fields(EvalSettings)}


def test_embed_yaml_holds_the_settings_and_nothing_else() -> None:
    assert set(read("embed")) - {"defaults", "hydra"} == {field.name for field in fields(EmbedSettings)}


def test_export_yaml_holds_the_settings_and_nothing_else() -> None:
    assert set(read("export")) - {"defaults", "hydra"} == {field.name for field in fields(ExportSettings)}


def test_every_method_goes_with_every_data_set_and_every_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, backbones = (CHOICES[group] for group in ("dataset", "backbone"))
    for method in CHOICES["method"]:
        # Each composition stands for two pairs.
        for _, dataset, backbone in zip(
            range(max(len(datasets), len(backbones))), itertools.cycle(datasets), itertools.cycle(backbones)
        ):
            parts = [f"method={method}", *given(f"dataset/{dataset}"), *given(f"backbone/{backbone}")]
            job = composed(monkeypatch, "train", *parts)
            assert job["_choices_"] | {"method": method, "dataset": dataset, "backbone": backbone} == job["_choices_"]
            assert job["backbone"]["image_size"] == job["dataset"]["image_size"]
