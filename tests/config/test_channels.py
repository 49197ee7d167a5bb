"""Means and standard deviations of images that do not have three channels, and the input channels of the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.utils import get_args_parser

from sslcli.cli.compose import checked_jobs
from sslcli.config.channels import DEFAULTS, with_channel_statistics, with_channels_of
from sslcli.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"
FILES = [
    path for path in sorted((CONF / "dataset").glob("*.yaml")) if "\nchannels:" in path.read_text(encoding="utf-8")
]


def composed(*lines: str) -> dict[str, Any]:
    return checked_jobs("train", get_args_parser().parse_args(["dataset=folder", "dataset.root=x", *lines]))[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_defaults_are_those_of_the_yaml_files(path: Path) -> None:
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert node["channels"] == 3
    assert {key: node[key] for key in DEFAULTS} == DEFAULTS


def test_files_with_channels() -> None:
    assert {path.stem for path in FILES} == {"folder", "imagenet", "flat", "list", "hf", "hf_stream"}


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(3, DEFAULTS["mean"], DEFAULTS["std"]), (1, [0.459], [0.226]), (5, [0.5] * 5, [0.25] * 5)],
)
def test_backbone_and_statistics_follow_the_channels(channels: int, mean: list[float], std: list[float]) -> None:
    job = composed(f"dataset.channels={channels}")
    assert (job["dataset"]["mean"], job["dataset"]["std"]) == (mean, std)
    assert job["backbone"]["in_channels"] == channels


@pytest.mark.parametrize("path", sorted((CONF / "backbone").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_backbone_has_three_input_channels_for_other_datasets(path: Path) -> None:
    lines = ["dataset=shapes", f"backbone={path.stem}", *(["backbone.name=resnet18"] if path.stem == "timm" else [])]
    job = checked_jobs("train", get_args_parser().parse_args(lines))[0]
    assert job["backbone"]["in_channels"] == 3


def test_values_of_the_user_are_kept() -> None:
    job = composed("dataset.channels=2", "dataset.mean=[0.1,0.2]", "backbone.in_channels=7")
    assert (job["dataset"]["mean"], job["dataset"]["std"]) == ([0.1, 0.2], [0.25, 0.25])
    assert job["backbone"]["in_channels"] == 7


@pytest.mark.parametrize("node", [None, "folder", {}, {"channels": "5"}, {"channels": True}, {"channels": 0}])
def test_other_nodes_are_not_changed(node: Any) -> None:
    node = node | DEFAULTS if isinstance(node, dict) else node
    assert with_channel_statistics(node) == node


def test_a_wrong_type_is_named() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.channels is 'gray', but it must be an integer"):
        composed("dataset.channels=gray")


def test_another_dataset_gets_the_channels_of_the_network() -> None:
    node = {"channels": 3, "root": "x"} | DEFAULTS
    assert with_channels_of(node, 3) == node
    assert with_channels_of(node, 1) == {"channels": 1, "root": "x", "mean": [0.459], "std": [0.226]}
    assert with_channels_of({"channels": 4}, 1) == {"channels": 4}
    assert with_channels_of({"root": "x"}, 1) == {"root": "x"}
