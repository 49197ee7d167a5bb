"""A small labeled set that a tiny network can learn, with task and start for the protocols that train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.evaluation.layers import BACKBONE, read
from sslcli.evaluation.online import collect
from sslcli.evaluation.task import Start, Task
from sslcli.nn.modes import evaluating
from sslcli.report.console import Screen

CPU = torch.device("cpu")


class Colors(Source):
    """Noisy images whose class is the channel that is a little brighter; positions 0 to 59 train, 60 to 89 test."""

    name, classes = "colors", ["red", "green", "blue"]

    def __init__(self, *, shift: int = 60) -> None:
        super().__init__(image_size=8)
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(90) % 3
        pixels = torch.randint(0, 180, (90, 3, 8, 8), generator=generator)
        pixels[torch.arange(90), self.labels] += shift
        self.images = pixels.to(torch.uint8)
        self.splits = {"train": torch.arange(60), "val": torch.arange(0), "test": torch.arange(60, 90)}


def task_of(source: Source) -> Task:
    return Task(
        source=source,
        views=Views([{"crop_scale": None}]),
        mean=source.mean,
        std=source.std,
        device=CPU,
        precision="fp32",
        batch_size=32,
        workers=None,
        screen=Screen(silent=True),
    )


def start_of(net: nn.Module, task: Task, *, layer: str = BACKBONE) -> Start:
    def encode(images: Tensor) -> Tensor:
        return read(net, layer, images)

    splits = {name: part for name, part in task.source.splits.items() if len(part)}
    with evaluating(net):
        features = collect(
            encode, task.source, splits, prepare=task.prepare, batch_size=32, device=CPU, precision="fp32"
        )
    return Start(net=net, layer=layer, features=features)
