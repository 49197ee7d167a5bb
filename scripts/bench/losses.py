"""Benchmark of the losses alone, forward and backward in float32: time, and memory beyond the inputs."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Result, run_benchmark, timed
from torch import Tensor

DIM, QUEUE, BATCH = 128, 65536, 256


def resident_mb() -> float:
    """Return the current resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def extra_mb(step: Callable[[], object]) -> float:
    """Run `step` and return the increase of the resident memory in MB at its peak."""
    ctypes.CDLL(None).malloc_trim(0)
    before, highest, done = resident_mb(), 0.0, threading.Event()

    def poll() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident_mb())
            time.sleep(0.0005)

    thread = threading.Thread(target=poll)
    thread.start()
    step()
    done.set()
    thread.join()
    return highest - before


def measure_loss(loss: Callable[[], Tensor], images: int) -> Result:
    """Measure forward and backward of a loss of `images` images: time, and memory as `extra_mb`."""

    def step() -> None:
        loss().backward()

    extra = extra_mb(step)
    return timed(step, images=images, seconds=6.0, warmup=1) | {"extra_mb": extra}


def pairs(count: int) -> tuple[Tensor, Tensor]:
    """Return random embeddings of two views, each (count, DIM), with requires_grad."""
    return torch.randn(count, DIM, requires_grad=True), torch.randn(count, DIM, requires_grad=True)


def sslcli_nt_xent(count: int) -> Result:
    """Measure sslcli's NT-Xent of `count` pairs."""
    from sslcli.methods.simclr import nt_xent

    z1, z2 = pairs(count)
    return measure_loss(lambda: nt_xent(z1, z2, temperature=0.1).loss, count)


def lightly_nt_xent(count: int) -> Result:
    """Measure lightly's NT-Xent of `count` pairs."""
    from lightly.loss import NTXentLoss

    z1, z2 = pairs(count)
    criterion = NTXentLoss(temperature=0.1)
    return measure_loss(lambda: criterion(z1, z2), count)


def stable_pretraining_nt_xent(count: int) -> Result:
    """Measure stable-pretraining's NT-Xent of `count` pairs."""
    from stable_pretraining.losses import NTXEntLoss

    z1, z2 = pairs(count)
    criterion = NTXEntLoss(temperature=0.1)
    return measure_loss(lambda: criterion(z1, z2), count)


def plain_torch_nt_xent(count: int) -> Result:
    """Measure NT-Xent of `count` pairs as one matrix product and a cross entropy."""
    z1, z2 = pairs(count)

    def loss() -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        logits = (z @ z.T / 0.1).fill_diagonal_(float("-inf"))
        return F.cross_entropy(logits, torch.arange(2 * count).roll(count))

    return measure_loss(loss, count)


def sslcli_queue() -> Result:
    """Measure sslcli's InfoNCE of BATCH queries against a queue of QUEUE keys."""
    from sslcli.nn.contrastive import info_nce

    query, key = pairs(BATCH)
    queue = F.normalize(torch.randn(QUEUE, DIM), dim=1)

    def loss() -> Tensor:
        q, k = F.normalize(query, dim=1), F.normalize(key.detach(), dim=1)
        return info_nce(q, k, queue, temperature=0.2).loss

    return measure_loss(loss, BATCH)


def lightly_queue() -> Result:
    """Measure lightly's NT-Xent of BATCH queries against a memory bank of QUEUE keys."""
    from lightly.loss import NTXentLoss

    query, key = pairs(BATCH)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, DIM))
    return measure_loss(lambda: criterion(query, key.detach()), BATCH)


if __name__ == "__main__":
    nt_xents = {
        "sslcli": sslcli_nt_xent,
        "lightly": lightly_nt_xent,
        "stable-pretraining": stable_pretraining_nt_xent,
        "plain torch": plain_torch_nt_xent,
    }
    run_benchmark(
        {f"nt_xent_{n}/{name}": partial(loss, n) for name, loss in nt_xents.items() for n in (256, 1024, 4096)}
        | {"queue/sslcli": sslcli_queue, "queue/lightly": lightly_queue}
    )
