"""k-NN accuracy over training time: sslcli and lightly, with the same backbone, images and training time.

    python scripts/bench/accuracy.py IMAGES OUT [--minutes 10] [--methods simclr moco_v2]

IMAGES contains one folder of 32-pixel images per class. Both libraries use the same training split, 128 images per
step, the recipe of `experiment=cifar10_METHOD`, bfloat16 if the processor supports it natively, channels-last memory,
an allocator that keeps freed memory, and a cosine schedule that ends with the training time. sslcli computes the k-NN
accuracy for both, on the held-out tenth of the images. The time of sslcli includes k-NN; the time of lightly does not.
The script writes OUT/curves.json and OUT/curves.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from end_to_end import small_backbone
from measure import ALLOCATOR_ENV, command
from torch import Tensor
from torch.utils.data import DataLoader
from training import build_lightly_step
from views import TransformedImages, lightly_transform
from workload import BATCH

POINTS = 8  # k-NN evaluations per run
STEP_FRACTION = 0.93  # fraction of the time for training steps; the rest is for k-NN and startup
PILOT_STEPS = 150
BANK = 10_000  # number of training images that k-NN compares with
TEMPERATURE, LR = {"simclr": 0.5, "moco_v2": 0.1}, {"simclr": 0.06, "moco_v2": 0.015}  # lr for BATCH images per step
Curve = list[tuple[float, float, int]]  # seconds of training, k-NN top-1, images seen


def sslcli_curve(method: str, images: Path, out: Path, seconds: float) -> Curve:
    """Run `ssl-train` for about `seconds`; the number of steps is computed from the speed of a short run before it."""
    line = [
        command("ssl-train"),
        f"experiment=cifar10_{method}",
        "backbone=small",
        "dataset=folder",
        f"dataset.root={images}",
        "dataset.image_size=32",
        "dataset.pretrain_on_val=false",
        f"train.batch_size={BATCH}",
        *([f"method.bn_group={BATCH}"] if method == "moco_v2" else []),
    ]
    pilot_dir, run_dir = out / f"pilot_{method}", out / method
    for leftover in (pilot_dir, run_dir):  # of an interrupted benchmark
        shutil.rmtree(leftover, ignore_errors=True)
    pilot = [
        f"train.max_steps={PILOT_STEPS}",
        "train.log_every_steps=10",
        "monitor.knn_every_epochs=0",
        f"run_dir={pilot_dir}",
    ]
    subprocess.run([*line, *pilot, "resume=never"], check=True, stdout=subprocess.DEVNULL)
    rates = sorted(record["train/images_per_s"] for record in metrics(pilot_dir) if "train/images_per_s" in record)
    steps = int(STEP_FRACTION * seconds * rates[len(rates) // 2] / BATCH)
    run = yaml.safe_load((pilot_dir / "config.yaml").read_text())
    assert run["monitor"]["knn_images"] in (None, BANK), run["monitor"]
    epochs = max(1, round(steps * BATCH / 45_000 / POINTS))
    final = [
        f"train.max_steps={steps}",
        f"monitor.knn_every_epochs={epochs}",
        f"run_dir={run_dir}",
        "resume=never",
    ]
    subprocess.run([*line, *final], check=True, stdout=subprocess.DEVNULL)
    return [
        (record["wall"], record["monitor/knn_top1"], record["step"] * BATCH)
        for record in metrics(run_dir)
        if "monitor/knn_top1" in record
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the `metrics.jsonl` of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def lightly_curve(method: str, images: Path, seconds: float) -> Curve:
    """Run lightly's example loop for `seconds` of training."""
    from sslcli.data.sources.files import Folder

    source = Folder(root=str(images), image_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.262))
    net, width = small_backbone()
    clock = 0.0
    step = build_lightly_step(
        method,
        net,
        width,
        best=True,
        temperature=TEMPERATURE[method],
        lr=lambda: LR[method] * (1 + math.cos(math.pi * min(clock / seconds, 1.0))) / 2,
    )
    paths = [Path(source.path(int(position))) for position in source.splits["train"]]
    loader = DataLoader(
        TransformedImages(paths, lightly_transform(32, blur=0.0)),
        batch_size=BATCH,
        num_workers=2,
        sampler=torch.utils.data.RandomSampler(paths, replacement=False, num_samples=1_000 * len(paths)),
        drop_last=True,
    )
    curve: Curve = []
    batches = iter(loader)
    for count in range(1, 10**9):
        before = time.perf_counter()
        step(next(batches))
        clock += time.perf_counter() - before
        if clock >= seconds * (len(curve) + 1) / POINTS:
            curve.append((clock, knn_top1(net, source), count * BATCH))
            print(curve[-1], file=sys.stderr, flush=True)
        if len(curve) == POINTS:
            break
    return curve


def knn_top1(
    net: torch.nn.Module, source: Any, *, k: int = 200, temperature: float = 0.07, bank: int | None = BANK
) -> float:
    """Return the k-NN top-1 accuracy in [0, 1] of the features of a network, computed as during training.

    `bank` is the number of training images that k-NN compares with; None = all.
    """
    from sslcli.evaluation.knn import Knn, bank_positions
    from sslcli.evaluation.online import collect
    from sslcli.nn.modes import evaluating

    def normalized(images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (source.mean, source.std))
        return (images - mean) / std

    with evaluating(net):
        features = collect(
            net,
            source,
            {"train": bank_positions(source, bank), "val": source.splits["val"]},
            prepare=normalized,
            batch_size=512,
            device=torch.device("cpu"),
            precision="fp32",
        )
    return float(Knn(k=k, temperature=temperature).measure(features)["top1"])


def plot(curves: dict[str, Curve], out: Path) -> None:
    """Plot accuracy over minutes, one panel per method, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text instead of paths: a fifth of the file size
    from matplotlib import pyplot

    methods = sorted({name.split("/")[0] for name in curves})
    figure, panels = pyplot.subplots(1, len(methods), figsize=(4.5 * len(methods), 3.4), sharey=True, squeeze=False)
    for panel, method in zip(panels[0], methods, strict=True):
        for library, color in (("sslcli", "#1b6ca8"), ("lightly", "#b3541e")):
            if curve := curves.get(f"{method}/{library}"):
                minutes, accuracy = [point[0] / 60 for point in curve], [100 * point[1] for point in curve]
                panel.plot(minutes, accuracy, marker="o", markersize=3, color=color, label=library)
        panel.set_title(method)
        panel.set_xlabel("minutes")
        panel.grid(color="#e4e4e4")
        panel.legend()
    panels[0, 0].set_ylabel("k-NN top-1, %")
    figure.tight_layout()
    figure.savefig(out)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of each run (default: %(default)s)")
    parser.add_argument("--methods", nargs="*", default=list(TEMPERATURE), choices=list(TEMPERATURE))
    parser.add_argument("--lightly", metavar="METHOD", help=argparse.SUPPRESS)  # train with lightly in this process
    options = parser.parse_args(arguments)
    if options.lightly:
        print(json.dumps(lightly_curve(options.lightly, options.images, 60 * options.minutes)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "curves.json"
    curves: dict[str, Curve] = json.loads(results.read_text()) if results.exists() else {}
    for method in options.methods:
        if f"{method}/sslcli" not in curves:
            curves[f"{method}/sslcli"] = sslcli_curve(method, options.images, options.out, 60 * options.minutes)
            results.write_text(json.dumps(curves))
        if f"{method}/lightly" not in curves:
            line = [sys.executable, __file__, str(options.images), str(options.out), "--lightly", method]
            line += ["--minutes", str(options.minutes)]
            environment = dict(os.environ) | ALLOCATOR_ENV
            process = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            curves[f"{method}/lightly"] = json.loads(process.stdout)
            results.write_text(json.dumps(curves))
    print("| run | minutes | images seen | k-NN |\n|---|---|---|---|")
    for name, curve in curves.items():
        seconds, accuracy, num_images = curve[-1]
        print(f"| {name} | {seconds / 60:.1f} | {num_images:,} | {100 * accuracy:.1f} |")
    plot(curves, options.out / "curves.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
