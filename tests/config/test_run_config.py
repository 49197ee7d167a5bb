"""Typed configurations of the commands."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from command_line import composed
from sslcli.config.run_config import LAUNCHERS, EvalConfig, RunConfig, export_config
from sslcli.config.settings import MultiSettings
from sslcli.config.slurm import SlurmSettings


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return composed("train", "method=moco", "train.epochs=7", "seed=3", "launcher=multi", "launcher.processes=2")


def test_sections_are_typed_and_nodes_are_plain(job: dict[str, Any]) -> None:
    config = RunConfig.from_plain(job)
    assert (config.seed, config.train.epochs, config.monitor.knn_k) == (3, 7, job["monitor"]["knn_k"])
    assert isinstance(config.launcher, MultiSettings)
    assert config.launcher.processes == 2
    assert config.method["_target_"] == "sslcli.methods.moco.MoCo"
    assert config.choices["method"] == "moco"
    assert config.overrides == ["method=moco", "train.epochs=7", "seed=3", "launcher=multi", "launcher.processes=2"]


def test_plain_values_give_the_same_configuration_through_json(job: dict[str, Any]) -> None:
    config = RunConfig.from_plain(job)
    assert RunConfig.from_plain(json.loads(json.dumps(config.plain()))) == config


def test_stored_values_have_no_facts_of_the_command_line(job: dict[str, Any]) -> None:
    config = RunConfig.from_plain(job)
    assert not [key for key in config.values if key.startswith("_")]
    assert config.values["launcher"]["kind"] == "multi"


def test_a_changed_copy_has_the_other_values_in_its_plain_form_too(job: dict[str, Any]) -> None:
    config = RunConfig.from_plain(job)
    other = config.changed(run_dir="/runs/x", resume="never")
    assert (other.run_dir, other.resume, other.values["run_dir"]) == ("/runs/x", "never", "/runs/x")
    assert config.run_dir is None
    assert other.changed(run_dir=None, resume="auto") == config


def test_a_configuration_cannot_be_modified(job: dict[str, Any]) -> None:
    config = RunConfig.from_plain(job)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_the_launcher_has_the_class_of_its_kind(kind: str) -> None:
    config = RunConfig.from_plain(composed("train", f"launcher={kind}"))
    assert type(config.launcher) is LAUNCHERS[kind]
    assert isinstance(config.launcher, SlurmSettings) == (kind == "slurm")


def test_an_evaluation_has_no_data_set_unless_one_is_chosen() -> None:
    config = EvalConfig.from_plain(composed("eval", "run=.", "protocol=knn", "dataset.limit=5"))
    assert (config.dataset, config.backbone) == (None, None)
    assert [tuple(change)[1:] for change in config.dataset_changes] == [("limit", 5)]
    assert config.protocol["_target_"] == "sslcli.evaluation.knn.Knn"
    config = EvalConfig.from_plain(composed("eval", "run=.", "dataset=shapes", "dataset.limit=5"))
    assert config.dataset is not None
    assert config.dataset["limit"] == 5
    assert config.dataset_changes == []


def test_an_export_has_its_typed_settings() -> None:
    config = export_config(composed("export", "run=.", "what=method"))
    assert config.what == "method"
    assert str(config.run).startswith("/")
