"""Features of random crops, on one and on two processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learnable import Colors, task_of
from processes import Pair
from sslcli.data.views.spec import View
from sslcli.distributed import collectives
from sslcli.evaluation.random_crops import crop_features
from sslcli.evaluation.training import batches, views_of


class Pixels(nn.Module):
    """The features are the pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def steps(total: int) -> list[tuple[Tensor, Tensor]]:
    task = task_of(Colors())
    with collectives.single_process():
        views = views_of(task, View(crop_scale=(0.3, 1.0), flip=0.5))
        loader = batches(task, torch.arange(60), views, batch_size=25, seed=3)
    return list(crop_features(Pixels(), "backbone", task, loader, total, width=192, seed=3))


def test_two_processes_yield_the_crops_of_one(pair: Pair) -> None:
    expected = steps(5)  # two steps per epoch
    assert [(index.shape, features.shape) for index, features in expected] == [((25,), (25, 192))] * 5
    assert len(set(torch.cat([expected[0][0], expected[1][0]]).tolist())) == 50
    assert not torch.equal(expected[0][1], expected[2][1])
    for found in pair.run(steps, 5):
        assert all(
            torch.equal(one, other) for ours, theirs in zip(found, expected, strict=True)
            for one, other in zip(ours, theirs, strict=True)
        )  # fmt: skip
