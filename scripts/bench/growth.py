"""Growth of time and memory of a step with batch size, queue size, image size, number of views and dataset size.

    python scripts/bench/growth.py --plot growth.svg [--only WORD ...]

Each point is a separate process. The last column of the table is the exponent p in "grows as n^p", computed
from the last two points of a curve.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from losses import measure_loss
from measure import Result, peak_mb, run_benchmark, timed
from pictures import file_paths, image_folder
from torch import Tensor
from workload import CPU

from sslcli.backbones.resnet import ResNet
from sslcli.backbones.small import Small
from sslcli.data.loader import Loader
from sslcli.data.sources.base import Source
from sslcli.data.sources.files import Folder
from sslcli.data.views.views import Views
from sslcli.engine import gradient_cache, precision
from sslcli.methods.base import Batch
from sslcli.methods.simclr import SimCLR, nt_xent
from sslcli.nn.contrastive import info_nce
from sslcli.runs.build import accelerate
from sslcli.system.memory import keep_freed_memory

VIEW = {"crop_scale": [0.2, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1], "jitter_p": 0.8, "grayscale": 0.2, "flip": 0.5}
MICRO_BATCH = 32  # images per micro-batch with cached gradients


class BlackImages(Source):
    """In-memory dataset of `count` black images of 32 pixels, with labels of two classes."""

    def __init__(self, count: int) -> None:
        super().__init__(image_size=32)
        self.name, self.classes = "black", ["a", "b"]
        self.images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
        self.labels = torch.arange(count) % 2
        self.split(torch.arange(count), labeled=torch.ones(count, dtype=torch.bool))


def micro_batches(count: int, size: int, part: int) -> list[Batch]:
    """Return `count` random images of `size` pixels with two views, in micro-batches of `part` images."""

    def views() -> list[Tensor]:
        return [torch.rand(part, 3, size, size).to(memory_format=torch.channels_last) for _ in range(2)]

    return [Batch(views(), torch.arange(part), torch.zeros(part, dtype=torch.long)) for _ in range(count // part)]


def step(count: int, size: int, *, cached: bool = False, resnet: bool = False) -> Result:
    """Measure a training step of SimCLR with `count` images of `size` pixels in the dtype of `precision=auto`."""
    net = ResNet("resnet18", image_size=size) if resnet else Small(image_size=size)
    method = accelerate(SimCLR(net)).train()
    dtype = precision.resolve("auto", CPU)
    batches = micro_batches(count, size, MICRO_BATCH if cached else count)
    scaler = precision.grad_scaler(CPU, dtype)

    def run() -> None:
        if cached:
            gradient_cache.backward(method, batches, device=CPU, dtype_name=dtype, scaler=scaler)
        else:
            with precision.autocast(CPU, dtype):
                loss = method(batches[0])["loss"]
            loss.backward()
        method.zero_grad(set_to_none=True)

    before = peak_mb()
    run()
    return timed(run, images=count, seconds=3.0, warmup=0) | {"extra_mb": peak_mb() - before}


def queue(length: int) -> Result:
    """Measure the loss of 256 queries against a queue of `length` keys, forward and backward."""
    query, key = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)
    negatives = torch.nn.functional.normalize(torch.randn(length, 128), dim=1)
    return measure_loss(lambda: info_nce(query, key, negatives, temperature=0.2).loss, 256)


def pairs(count: int) -> Result:
    """Measure NT-Xent of `count` pairs, forward and backward."""
    z1, z2 = torch.randn(count, 128, requires_grad=True), torch.randn(count, 128, requires_grad=True)
    return measure_loss(lambda: nt_xent(z1, z2, temperature=0.1).loss, count)


def loading(source: Source, views: int) -> Result:
    """Measure the loader with `views` views of 256 images per step, without the first step of the epoch."""
    loader = Loader(source, Views([VIEW | {"count": views}]), batch_size=256, accumulate=1, seed=0, device=CPU)
    steps = loader.steps(0, 10**9)
    next(steps)
    return timed(lambda: next(steps), images=256, seconds=3.0, warmup=1)


def in_memory(count: int) -> Result:
    """Measure the loader with `count` in-memory images; `extra_mb` is the peak memory of the process."""
    source = BlackImages(count)
    return loading(source, 2) | {"extra_mb": peak_mb()}


def in_files(count: int) -> Result:
    """Measure the loader with `count` files, hard links to 1,024 synthetic ones, and the time to list them."""
    images = file_paths(image_folder((32, 32), 1024))
    root = Path(os.environ["BENCH_FOLDER"]) / f"files{count}"
    for number in range(0 if root.exists() else count):
        path = root / str(number % 100) / f"{number // 100}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(images[number % len(images)], path)
    before = time.perf_counter()
    source = Folder(root=str(root), image_size=32, workers=1)
    listing = time.perf_counter() - before
    return loading(source, 2) | {"listing_s": listing, "extra_mb": peak_mb()}


def view_count(views: int) -> Result:
    """Measure the loader with `views` views per image."""
    return loading(BlackImages(4096), views)


CURVES: dict[str, tuple[str, Callable[[int], Result], Sequence[int]]] = {
    "batch": ("images per step (small, 32 px)", lambda n: step(n, 32), (32, 64, 128, 256, 512, 1024)),
    "side": ("image side in pixels (small, 32 images)", lambda n: step(32, n), (32, 64, 128, 224)),
    "plain": ("images per step (ResNet-18)", partial(step, size=32, resnet=True), (32, 64, 128, 256)),
    "cached": (
        f"images per step (ResNet-18, cached gradients, {MICRO_BATCH} at a time)",
        partial(step, size=32, resnet=True, cached=True),
        (32, 64, 128, 256),
    ),
    "queue": ("keys in the queue", queue, (1024, 4096, 16384, 65536, 262144)),
    "pairs": ("pairs of NT-Xent", pairs, (256, 1024, 4096, 8192)),
    "views": ("views per image", view_count, (1, 2, 4, 8)),
    "memory": ("in-memory images", in_memory, (1_000, 10_000, 100_000, 1_000_000)),
    "files": ("image files", in_files, (1_000, 10_000, 100_000, 1_000_000)),
}


def point(name: str, size: int) -> Result:
    """Measure one point of a curve in a new process."""
    command = [sys.executable, __file__, f"{name}/{size}"]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    result: Result = json.loads(process.stdout)
    print(f"{name} {size}: {process.stdout.strip()}", file=sys.stderr, flush=True)
    return result


def rows(name: str, sizes: Sequence[int], results: Sequence[Result]) -> list[str]:
    """Return the rows of a Markdown table, one per metric of a curve."""
    lines = []
    for metric in ("ms", "extra_mb", "listing_s"):
        if metric in results[0]:
            values = [result[metric] for result in results]
            power = math.log(max(values[-1], 1e-9) / max(values[-2], 1e-9)) / math.log(sizes[-1] / sizes[-2])
            cells = ", ".join(f"{size:,}: {value:.4g}" for size, value in zip(sizes, values, strict=True))
            lines.append(f"| {CURVES[name][0]} | {metric} | {cells} | {power:.2f} |")
    return lines


def plot(curves: dict[str, list[Result]], out: Path) -> None:
    """Plot time and memory of all curves as SVG, log-log; one panel has the steps with and without cached gradients."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text instead of paths: smaller files
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    names = [name for name in curves if name != "cached" or "plain" not in curves]
    figure, panels = pyplot.subplots(len(names), 2, figsize=(7.5, 2.3 * len(names)), squeeze=False)
    for row, name in zip(panels, names, strict=True):
        shown = [name, *(["cached"] if name == "plain" and "cached" in curves else [])]
        for panel, key, label in zip(row, ("ms", "extra_mb"), ("ms per step", "MB"), strict=True):
            if key not in curves[name][0]:
                panel.axis("off")
                continue
            sizes = CURVES[name][2]
            for curve, color in zip(shown, ("#1b6ca8", "#b3541e"), strict=False):
                values = [max(result[key], 0.1) for result in curves[curve]]
                panel.loglog(sizes, values, marker="o", markersize=4, color=color)
            low, high = min(values), max(result[key] for curve in shown for result in curves[curve])
            panel.set_ylim(low / 2, max(2 * high, 30 * low))  # at least a factor of 60, so that noise appears flat
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.set_title(CURVES[name][0].split(" (")[0] if len(shown) > 1 else CURVES[name][0], fontsize=8)
            panel.set_ylabel(label, fontsize=8)
            panel.grid(visible=True, which="major", color="#e4e4e4")
        if len(shown) > 1:
            row[1].legend(["ResNet-18, plain step", f"cached gradients, {MICRO_BATCH} at a time"], fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, required=True, help="SVG file to write")
    parser.add_argument("--only", nargs="*", default=[], help=f"curves: {', '.join(CURVES)}")
    options = parser.parse_args(arguments)
    curves: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="sslcli-bench-") as scratch:
        os.environ.setdefault("BENCH_FOLDER", scratch)
        for name in options.only or CURVES:
            curves[name] = [point(name, size) for size in CURVES[name][2]]
    print("| n | metric | values | p in n^p |\n|---|---|---|---|")
    print("\n".join(row for name, results in curves.items() for row in rows(name, CURVES[name][2], results)))
    plot(curves, options.plot)
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2 and "/" in sys.argv[1]:
        keep_freed_memory()
        run_benchmark({f"{name}/{n}": partial(run, n) for name, (_, run, sizes) in CURVES.items() for n in sizes})
    else:
        sys.exit(main(sys.argv[1:]))
