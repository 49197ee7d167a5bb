"""Validation of dotted keys."""

from __future__ import annotations

import pytest
from omegaconf import DictConfig, OmegaConf

from sslcli.config.keys import check_path
from sslcli.errors import ConfigError


@pytest.fixture
def base() -> DictConfig:
    return OmegaConf.create(
        {
            "seed": 0,
            "hydra": {"job": {"name": "x"}},
            "train": {"epochs": 3, "milestones": [0.6, 0.8]},
            "method": {"_target_": "sslcli.methods.byol.BYOL", "hidden": 8},
            "dataset": {"root": "???", "nuisances": {"color": 1.0}},
            "backbone": {"_target_": "package_without_source.Net", "image_size": "${dataset.size}"},
            "views": {"views": [{"blur": 0.5}]},
        }
    )


@pytest.mark.parametrize(
    "path",
    [
        "seed",
        "train.epochs",
        "train.milestones.1",
        "views.views.0.blur",
        "method.hidden",
        "dataset.root",  # a mandatory value
        "dataset.root.below",  # unknown until it has a value
        "backbone.image_size.below",  # an interpolation
        "dataset.nuisances.color",
    ],
)
def test_keys_of_the_configuration_are_accepted(path: str, base: DictConfig) -> None:
    check_path("train", path, base, may_add=False)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sed", ["sed", "Did you mean 'seed'?", "monitor"]),
        ("train.epohcs", ["train.epohcs", "Did you mean 'epochs'?"]),
        ("train.epochs.more", ["train.epochs.more", "train.epochs is a single value"]),
        ("train.milestones.2", ["train.milestones", "length 2"]),
        ("train.milestones.last", ["train.milestones", "'last'"]),
        ("method.hiden", ["method.hiden", "Did you mean 'hidden'?"]),
        ("dataset.nuisances.colr", ["dataset.nuisances.colr", "Did you mean 'color'?", "+dataset.nuisances.colr=..."]),
    ],
)
@pytest.mark.parametrize("may_add", [False, True])
def test_unknown_keys_are_refused_with_or_without_a_sign(
    path: str, expected: list[str], may_add: bool, base: DictConfig
) -> None:
    with pytest.raises(ConfigError) as error:
        check_path("train", path, base, may_add=may_add)
    assert [part for part in expected if part not in str(error.value)] == [], error.value


def test_a_parameter_that_the_yaml_lacks_needs_a_plus_sign(base: DictConfig) -> None:
    check_path("train", "method.momentum", base, may_add=True)
    with pytest.raises(ConfigError, match=r"method\.momentum.*\+method\.momentum=\.\.\."):
        check_path("train", "method.momentum", base, may_add=False)


def test_arguments_that_the_command_passes_are_not_suggested(base: DictConfig) -> None:
    with pytest.raises(ConfigError) as error:
        check_path("train", "method.nonesuch", base, may_add=True)
    assert "projector" not in str(error.value).partition("Known")[0]
    known = str(error.value).partition("Known keys in method: ")[2].split(", ")
    assert "hidden" in known
    assert not {"backbone", "num_images", "_target_"} & set(known)


def test_keys_of_a_class_without_readable_source_are_left_to_its_constructor(base: DictConfig) -> None:
    check_path("train", "backbone.whatever", base, may_add=True)


def test_the_groups_of_the_command_are_known_at_the_top(base: DictConfig) -> None:
    with pytest.raises(ConfigError, match="protocol"):
        check_path("eval", "protocl", base, may_add=False)
    with pytest.raises(ConfigError) as error:
        check_path("train", "protocl", base, may_add=False)
    assert "protocol" not in str(error.value)
    assert "hydra" not in str(error.value)
