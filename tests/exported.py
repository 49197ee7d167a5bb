"""Trained backbones for tests of export formats, and their round trip through a format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.config.settings import ExportSettings
from sslcli.runs.export_check import difference, features_of
from sslcli.runs.exported_run import ExportedRun
from sslcli.weights.export.preprocessing import Preprocessing
from sslcli.weights.export.target import Target, Trained


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    """Change the working directory within the `with` block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def trained(net: nn.Module, *, size: int, channels: int = 3, build: Callable[[], nn.Module] | None = None) -> Trained:
    """`net` as if it had been trained: all of its weights and statistics are random."""
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) / 4 if name.endswith("var") else torch.randn_like(value) / 20)
    mean, std = [0.4, 0.5, 0.6, 0.7][:channels], [0.2, 0.3, 0.4, 0.5][:channels]
    return Trained(
        net=net.eval(),
        build=build or (lambda: net),
        settings={"_target_": f"{type(net).__module__}.{type(net).__qualname__}"},
        preprocessing=Preprocessing(image_size=size, resized_side=size + 4, mean=tuple(mean), std=tuple(std)),
        facts={"seed": 0},
    )


def round_trip(target: Target, one: Trained, folder: Path) -> float:
    """Write `one` to `folder`, load it, and return the relative difference of the features of random images."""
    assert target.obstacle(one) is None
    target.write(one, folder)
    given = one.preprocessing
    images = torch.rand(3, given.channels, given.image_size, given.image_size)
    prepared = given.normalize(images)
    loaded = target.load(one, folder)
    return difference(features_of(loaded, images if target.normalizes else prepared), features_of(one.net, prepared))


def run_usage(target: Target, one: Trained, folder: Path, images: Tensor) -> Any:
    """Run the code of the model card in `folder`, and return its `features`."""
    names: dict[str, Any] = {"images": images}
    with torch.inference_mode(), chdir(folder):
        exec(target.usage(one), names)
    return names["features"]


def exported_run(run_dir: Path, **changes: Any) -> ExportedRun:
    """Read a run as ssl-export does. `changes` are settings of ssl-export."""
    settings = {"checkpoint": "last", "what": "backbone", "format": "torch", "out": None, "trust": []}
    return ExportedRun.read(ExportSettings(run=str(run_dir), **(settings | changes)))
