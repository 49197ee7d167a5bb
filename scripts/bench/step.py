"""Time the parts of a training step on this machine: views, step of each method, NT-Xent; `make bench`.

Prints images a second (source images, two views each) and ratios against the obvious way measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from sslcli.backbones.small import Small
from sslcli.data.loader import Loader
from sslcli.data.sources import Shapes
from sslcli.data.views import Views
from sslcli.methods.base import Batch, Method
from sslcli.methods.byol import BYOL
from sslcli.methods.moco import MoCo
from sslcli.methods.moco_v3 import MoCoV3
from sslcli.methods.simclr import SimCLR, nt_xent

VIEWS = [{"count": 2, "crop_scale": [0.08, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1], "jitter_p": 0.8, "grayscale": 0.2}]


def median_seconds(work: Callable[[], object], *, repeats: int) -> float:
    """Median time of `work` after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def bench_views(source: Shapes, batch_size: int, repeats: int) -> None:
    """Batched views against torchvision's transforms, image by image, with the same parameters' distribution."""
    loader = Loader(source, Views(VIEWS), batch_size=batch_size, accumulate=1, seed=0, device=torch.device("cpu"))
    batches = loader.steps(0, 10_000)
    ours = batch_size / median_seconds(lambda: next(batches), repeats=repeats)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    assert source.images is not None
    images = source.images[:batch_size]
    peer = batch_size / median_seconds(lambda: [(transform(i), transform(i)) for i in images], repeats=2)
    print(f"two views at 32 px: {ours:8.0f} images/s; torchvision v2 by image {peer:6.0f}; ratio {ours / peer:.1f}")


def bench_step(name: str, method: Method, batch: Batch, repeats: int) -> None:
    """One training step: forward, backward, optimizer, momentum networks."""
    method = method.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        method(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(0.5)

    rate = len(batch.index) / median_seconds(step, repeats=repeats)
    print(f"step of {name:8s} with the small backbone: {rate:6.0f} images/s")


def bench_nt_xent(pairs: int, repeats: int) -> None:
    """Chunked NT-Xent against the whole matrix, forward and backward."""
    z1, z2 = (torch.randn(pairs, 128, requires_grad=True) for _ in range(2))

    def explicit() -> None:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        logits = (z @ z.T / 0.1).fill_diagonal_(float("-inf"))
        F.cross_entropy(logits, torch.arange(2 * pairs).roll(pairs)).backward()

    ours = median_seconds(lambda: nt_xent(z1, z2, temperature=0.1).loss.backward(), repeats=repeats)
    whole = median_seconds(explicit, repeats=repeats)
    print(f"NT-Xent, {pairs} pairs: {1e3 * ours:6.0f} ms; whole matrix {1e3 * whole:6.0f} ms; ratio {whole / ours:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    source = Shapes(image_size=32, train_images=2000, test_images=0)
    bench_views(source, arguments.batch_size, arguments.repeats)
    images = [torch.randn(arguments.batch_size, 3, 32, 32).to(memory_format=torch.channels_last) for _ in range(2)]
    index = torch.arange(arguments.batch_size)
    batch = Batch(images, index, index)
    methods: dict[str, Callable[[], Method]] = {
        "simclr": lambda: SimCLR(Small(image_size=32)),
        "moco": lambda: MoCo(Small(image_size=32), queue_size=4096),
        "moco_v2": lambda: MoCo(Small(image_size=32), queue_size=4096, mlp_head=True),
        "moco_v3": lambda: MoCoV3(Small(image_size=32), hidden=1024),
        "byol": lambda: BYOL(Small(image_size=32), hidden=1024),
    }
    for name, build in methods.items():
        bench_step(name, build(), batch, arguments.repeats)
    for pairs in (1024, 4096):
        bench_nt_xent(pairs, max(3, arguments.repeats // 2))


if __name__ == "__main__":
    main()
