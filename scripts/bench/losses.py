"""The losses alone, forward and backward, fp32: time and memory beyond what was there before."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Result, answer, timed
from torch import Tensor

DIM, QUEUE, BATCH = 128, 65536, 256


def resident_mb() -> float:
    """Memory of this process at this moment."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def extra_mb(step: Callable[[], object]) -> float:
    """How far memory rises above the level before, while `step` runs."""
    ctypes.CDLL(None).malloc_trim(0)
    before, highest, done = resident_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident_mb())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return highest - before


def measured(loss: Callable[[], Tensor], images: int) -> Result:
    def step() -> None:
        loss().backward()

    extra = extra_mb(step)
    return timed(step, images=images, seconds=6.0, warmup=1) | {"extra_mb": extra}


def pairs(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, DIM, requires_grad=True), torch.randn(count, DIM, requires_grad=True)


def ours_nt_xent(count: int) -> Result:
    from sslcli.methods.simclr import nt_xent

    z1, z2 = pairs(count)
    return measured(lambda: nt_xent(z1, z2, temperature=0.1).loss, count)


def lightly_nt_xent(count: int) -> Result:
    from lightly.loss import NTXentLoss

    z1, z2 = pairs(count)
    criterion = NTXentLoss(temperature=0.1)
    return measured(lambda: criterion(z1, z2), count)


def stable_pretraining_nt_xent(count: int) -> Result:
    from stable_pretraining.losses import NTXEntLoss

    z1, z2 = pairs(count)
    criterion = NTXEntLoss(temperature=0.1)
    return measured(lambda: criterion(z1, z2), count)


def naive_nt_xent(count: int) -> Result:
    z1, z2 = pairs(count)

    def loss() -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        logits = (z @ z.T / 0.1).fill_diagonal_(float("-inf"))
        return F.cross_entropy(logits, torch.arange(2 * count).roll(count))

    return measured(loss, count)


def ours_queue() -> Result:
    from sslcli.nn.contrastive import info_nce

    query, key = pairs(BATCH)
    queue = F.normalize(torch.randn(QUEUE, DIM), dim=1)

    def loss() -> Tensor:
        q, k = F.normalize(query, dim=1), F.normalize(key.detach(), dim=1)
        return info_nce(q, k, queue, temperature=0.2).loss

    return measured(loss, BATCH)


def lightly_queue() -> Result:
    from lightly.loss import NTXentLoss

    query, key = pairs(BATCH)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, DIM))
    return measured(lambda: criterion(query, key.detach()), BATCH)


if __name__ == "__main__":
    nt_xents = {
        "sslcli": ours_nt_xent,
        "lightly": lightly_nt_xent,
        "stable-pretraining": stable_pretraining_nt_xent,
        "plain torch": naive_nt_xent,
    }
    answer(
        {f"nt_xent_{n}/{name}": partial(side, n) for name, side in nt_xents.items() for n in (256, 1024, 4096)}
        | {"queue/sslcli": ours_queue, "queue/lightly": lightly_queue}
    )
