"""Every recipe in conf/experiment composes and trains its first steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra._internal.utils import get_args_parser

from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.runs import worker

CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SIZES = (32, 64, 112, 128)  # of the images, where the recipe's own are larger: the first that backbone and method take
LARGE = 512  # whole numbers beyond are widths and counts of negatives, which take time and decide nothing here
OVERRIDES = [
    "dataset=shapes",
    "dataset.limit=8",
    "dataset.test_images=0",
    "dataset.val_fraction=0",
    "device=cpu",
    "dry_run=true",
    "launcher.threads=1",
    "monitor.pictures=0",
    "train.accumulate=1",
    "train.batch_size=4",
    "train.precision=fp32",
]


@pytest.fixture(autouse=True)
def _determinism_as_before() -> Iterator[None]:
    before = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(before)


def composed(*lines: str) -> dict[str, Any]:
    return checked_jobs("train", get_args_parser().parse_args(list(lines)))[0]


def smaller(node: dict[str, Any]) -> dict[str, Any]:
    """Return the node with small networks and banks."""
    found = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found[key] = smaller(value)
        elif isinstance(value, int) and value > LARGE:
            found[key] = 64
        elif key == "num_prototypes" and isinstance(value, list):
            found[key] = [8] * len(value)  # at most the number of images
        elif key == "arch":
            found[key] = "resnet18"
        elif key == "num_heads":
            found[key] = 2  # divides the smaller width
        else:
            found[key] = min(value, 2) if key == "depth" else value
    return found


def test_there_are_experiments_for_both_kinds_of_sets() -> None:
    assert {"cifar10_moco_v2", "imagenet_moco_v2"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("word", EXPERIMENTS)
def test_a_recipe_names_all_that_it_is_made_of(word: str) -> None:
    found = yaml.safe_load((CONF / "experiment" / f"{word}.yaml").read_text())
    chosen = {line.removeprefix("override /") for entry in found["defaults"] for line in entry}
    assert {"method", "dataset", "backbone", "views", "optimizer"} <= chosen
    assert {"epochs", "batch_size"} <= set(found["train"])
    assert "lr" in found["optimizer"]


@pytest.mark.parametrize("word", EXPERIMENTS)
def test_a_recipe_takes_its_first_steps_at_reduced_size(
    word: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = composed(f"experiment={word}")
    own, output = whole["dataset"]["image_size"], ""
    for size in SIZES if own > SIZES[1] else (own,):
        config = composed(f"experiment={word}", *OVERRIDES, f"dataset.image_size={size}", f"run_dir={tmp_path}")
        for group in ("method", "views", "optimizer"):
            assert config["_choices_"][group] == whole["_choices_"][group]
        config |= {group: smaller(config[group]) for group in ("method", "backbone")}
        if worker.run(RunConfig.from_plain(config)) == 0:
            return
        output = capfd.readouterr().err
    pytest.fail(output)
