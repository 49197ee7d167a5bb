"""Very short runs of every method of conf/method/*.yaml. FAMILIES has one method of each family."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from hydra._internal.utils import get_args_parser

import sslcli
from sslcli.backbones.small import Small
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.distributed import collectives
from sslcli.methods.base import Batch, Method
from sslcli.nn import noise
from sslcli.runs import worker
from sslcli.runs.parts import build_parts
from tiny import make_batch, mine

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
def teacher_overrides(word: str) -> list[str]:
    """Overrides with the teacher that a method needs: a small network with random weights, in a temporary file."""
    if word != "distill":
        return []
    path = Path(tempfile.mkdtemp(prefix="sslcli-teacher-")) / "teacher.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        torch.save(Small(width=6, image_size=32).state_dict(), path)
    atexit.register(shutil.rmtree, path.parent)
    return [f"teacher={path}", "+backbone@teacher_backbone=small", "teacher_backbone.width=6"]


@cache
def composed(word: str) -> RunConfig:
    """A very short run of the method; tests must not modify it."""
    arguments = [f"method={word}", *teacher_overrides(word), *OVERRIDES]
    job = checked_jobs("train", get_args_parser().parse_args(arguments))[0]
    for group in ("method", "backbone"):
        job[group] |= {key: value for key, value in SMALLER.items() if job[group].get(key) is not None}
    if isinstance(job["method"].get("num_prototypes"), list):  # of heads that cluster the 64 images
        job["method"]["num_prototypes"] = [8, 8, 12]
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


def check_two_ranks(whole: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless two ranks, one after the other, have the loss and gradients of `whole` (float64) on all 8 images."""
    twin, batch = copy.deepcopy(whole), make_batch(8, views=1, dtype=torch.float64)
    loss = whole(batch)["loss"]
    loss.backward()
    losses, state = [], copy.deepcopy(twin.state_dict())
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    for rank in (0, 1):
        twin.load_state_dict(state)
        for module in (collectives, noise):
            monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        losses.append(twin(mine(batch))["loss"] / 2)
        losses[-1].backward()
    torch.testing.assert_close(sum(losses), loss, rtol=1e-12, atol=0)
    for (name, one), other in zip(whole.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: name + text)
