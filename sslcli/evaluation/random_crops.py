"""Features of random crops, computed in every step by a frozen network, for probes that train on augmented images.

Sizes: N images per batch, d features, W processes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from functools import partial

import torch
from torch import Tensor, nn

from sslcli.data.loader import Loader
from sslcli.distributed import collectives, shared_work, watchdog
from sslcli.distributed.devices import unchanged_random_state
from sslcli.engine import precision
from sslcli.evaluation import layers
from sslcli.evaluation.task import Task
from sslcli.nn.modes import evaluating


@torch.no_grad()
def crop_features(
    net: nn.Module, layer: str, task: Task, loader: Loader, total: int, *, width: int, seed: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield the image numbers (N,) and the features (N, width) float32 of the random crops of each of `total` steps.

    All processes yield all steps, but with W processes, a process reads and encodes only every W-th batch. A batch
    contains the same images as with one process, so the features are the same.

    Args:
        net: the frozen network, which runs in evaluation mode.
        layer: the layer of the features, see `sslcli.evaluation.layers`.
        task: device and precision of the forward passes.
        loader: loader of the training batches, see `sslcli.evaluation.training.batches`.
        total: number of steps.
        width: number of features per image.
        seed: seed of the data workers.
    """
    rank, size = collectives.rank(), collectives.world_size()
    loader.stride = size

    def encoded(step: int) -> Tensor:
        watchdog.report_progress()
        if step >= total:
            return torch.empty(0, width, device=task.device)
        with collectives.single_process(), precision.autocast(task.device, task.precision):
            (batch,) = next(steps)
            return layers.read(net, layer, batch.views[0]).float()

    with (
        evaluating(net),
        unchanged_random_state(task.device),
        closing(loader.steps(rank, total)) as steps,
    ):
        torch.manual_seed(seed)  # a DataLoader draws the base seed of its workers from the global generator
        for first in range(0, total, size):
            sizes = [loader.batch_size if step < total else 0 for step in range(first, first + size)]
            found = shared_work.gather_parts(shared_work.agreed(partial(encoded, first + rank)), sizes)
            for step, rows in enumerate(torch.split(found, loader.batch_size), start=first):
                epoch, number = divmod(step, loader.steps_per_epoch)
                if number == 0:
                    with collectives.single_process():
                        order = loader.request_columns(epoch)[0]
                yield order[number, 0], rows
