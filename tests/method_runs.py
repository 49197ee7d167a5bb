"""Very short runs of every method of conf/method/*.yaml. FAMILIES has one method of each family."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch
import yaml
from hydra._internal.utils import get_args_parser

import sslcli
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.methods.base import Batch
from sslcli.runs import worker
from sslcli.runs.build import build_parts

FILES = sorted((Path(sslcli.__file__).parents[1] / "conf" / "method").glob("*.yaml"))
METHODS = [path.stem for path in FILES]
FAMILIES = sorted({yaml.safe_load(path.read_text())["about"]["family"]: path.stem for path in FILES}.values())
CPU = torch.device("cpu")
OVERRIDES = [
    "dataset=shapes",
    "dataset.train_images=64",
    "dataset.test_images=0",
    "dataset.val_fraction=0",
    "device=cpu",
    "launcher.threads=1",
    "train.batch_size=16",
    "train.precision=fp32",
    "train.max_steps=10",
    "train.save_every_steps=5",
    "train.log_every_steps=1",
    "monitor.knn_every_epochs=0",
    "monitor.pictures=0",
    "monitor.health_every_steps=4",
]
SMALLER = {  # of the keys a method or backbone has
    **{"queue_size": 40, "hidden": 32, "dim": 16, "width": 4},
    **{"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
}
SMALLER_VIT = {"width": 32, "depth": 2, "num_heads": 2}  # of a backbone with attention


@cache
def composed(word: str) -> RunConfig:
    """A very short run of the method; tests must not modify it."""
    job = checked_jobs("train", get_args_parser().parse_args([f"method={word}", *OVERRIDES]))[0]
    for group in ("method", "backbone"):
        job[group] |= {key: value for key, value in SMALLER.items() if job[group].get(key) is not None}
    job["backbone"] |= SMALLER_VIT if "num_heads" in job["backbone"] else {}
    return RunConfig.from_plain(job)


def config_of(word: str) -> RunConfig:
    return copy.deepcopy(composed(word))


@cache
def iterate_batches(word: str) -> list[Batch]:
    """The first epoch of that run: four batches."""
    config = composed(word)
    loader = worker.build_loader(config, build_parts(config), CPU)
    return [micro_batches[0] for micro_batches in loader.steps(0, 4)]
