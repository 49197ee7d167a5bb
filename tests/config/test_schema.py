"""Validation of composed configurations: unknown and missing keys, types, ranges, `_target_` entries."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from command_line import composed
from sslcli.config import schema
from sslcli.errors import ConfigError

DELETED = object()


@pytest.fixture(scope="module")
def valid() -> dict[str, Any]:
    """A configuration as Hydra composes it. Tests copy it and must not modify it."""
    job = composed("train", "launcher=slurm")
    return {key: value for key, value in job.items() if not key.startswith("_")}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted path; DELETED removes the key."""
    config = copy.deepcopy(config)
    *parents, name = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    if value is DELETED:
        del node[name]
    else:
        node[name] = value
    return config


def test_what_the_yaml_files_compose_is_valid(valid: dict[str, Any]) -> None:
    schema.check("train", copy.deepcopy(valid))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("sed", 1, ["sed", "Did you mean 'seed'?"]),
        ("seed", "x", ["seed is 'x'"]),
        ("seed", DELETED, ["lacks seed"]),
        ("train.epohcs", 1, ["train.epohcs", "Did you mean 'epochs'?"]),
        ("train.epochs", DELETED, ["train lacks epochs"]),
        ("train.epochs", 0, ["train.epochs is 0", "at least 1"]),
        ("train", 5, ["train is 5", "epochs"]),
        ("monitor.knn_k", "x", ["monitor.knn_k is 'x'"]),
        ("sweep.jobs", 0, ["sweep.jobs is 0"]),
        ("launcher.kind", "cloud", ["launcher.kind is 'cloud'", "local, multi, slurm"]),
        ("launcher.partitions", "x", ["launcher.partitions", "Did you mean 'partition'?"]),
        ("launcher.nodes", 3, ["train.batch_size is 256", "3 processes", "multiple of 3"]),
        ("method", DELETED, ["method is missing", "method=..."]),
        ("method", 5, ["method is 5", "mapping"]),
        ("method._target_", DELETED, ["method has no _target_", "@package _global_"]),
        ("method._target_", "sslcli.methods.simclr.SimCLRR", ["SimCLRR", "no such class"]),
        ("method._target_", "os.system", ["os.system", "trust=[os]"]),
        ("method.temperature", "warm", ["method.temperature is 'warm'"]),
        ("method.temprature", 1.0, ["method.temprature", "Did you mean 'temperature'?"]),
        ("method.backbone", {}, ["method.backbone"]),  # passed by the command, never set
        ("method.mixture", "unmix", ["mixture=unmix"]),
        ("optimizer.params", [], ["optimizer.params"]),
        ("dataset.seed", -1, ["dataset.seed is -1", "at least 0"]),
        ("views.views", 5, ["views.views is 5"]),
        ("dataset.limit", "???", ["dataset.limit has no value"]),
        ("trust", ["mine", 5], ["trust is ['mine', 5]"]),
        ("experiment", {"train": {}}, ["experiment", "@package _global_"]),
        ("mixture", {"beta": 1}, ["mixture", "method.mixture.KEY"]),
    ],
)
def test_an_invalid_configuration_is_refused_by_the_name_of_its_key(
    path: str, value: Any, expected: list[str], valid: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as error:
        schema.check("train", changed(valid, path, value))
    assert [part for part in expected if part not in str(error.value)] == [], error.value


def test_a_text_that_yaml_reads_as_a_number_is_shown_in_quotes(valid: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="""name='"5"'"""):
        schema.check("train", changed(valid, "name", 5))


def test_a_mixture_is_refused_with_the_methods_that_support_one(valid: dict[str, Any]) -> None:
    method = {
        "_target_": "sslcli.methods.memory_bank.MemoryBank",
        "mixture": {"_target_": "sslcli.methods.mixture.UnMix"},
    }
    with pytest.raises(ConfigError, match=r"method\.mixture: .*MemoryBank.*: .*simclr"):
        schema.check("train", changed(valid, "method", method))


def test_nodes_inside_nodes_are_checked_as_well(valid: dict[str, Any]) -> None:
    inner = {"_target_": "sslcli.data.sources.files.Folder", "nonesuch": 1}
    with pytest.raises(ConfigError, match=r"dataset\.inner\.nonesuch"):
        schema.check("train", changed(valid, "dataset.inner", inner))


def test_the_keys_of_a_class_without_readable_source_are_not_checked(valid: dict[str, Any]) -> None:
    config = changed(valid, "backbone", {"_target_": "package_without_source.Net", "anything": "goes"})
    schema.check("train", config | {"trust": ["package_without_source"]})


def test_groups_that_may_be_omitted_may_be_null() -> None:
    job = {key: value for key, value in composed("eval", "run=.").items() if not key.startswith("_")}
    schema.check("eval", job | {"dataset": None, "backbone": None})
    with pytest.raises(ConfigError, match="protocol is missing"):
        schema.check("eval", job | {"protocol": None})
    with pytest.raises(ConfigError, match="Did you mean 'protocol'"):
        schema.check("eval", job | {"protocl": None})
