"""Accuracy for time: sslcli and lightly train on the same images with the same backbone for the same minutes.

    python scripts/bench/accuracy.py IMAGES OUT [--minutes 10] [--methods simclr moco_v2]

IMAGES holds one folder a class of 32-pixel images. Both sides see the same training split, 128 images a step, with the
recipe of `experiment=cifar10_METHOD`, bfloat16 where the processor has it, channels-last memory, an allocator that
keeps memory, and a cosine that ends with the time. k-NN is sslcli's for both, on the held-out tenth. lightly's clock
stands still while k-NN is measured; sslcli's runs on. Writes OUT/curves.json and OUT/curves.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from end_to_end import small
from measure import TUNED, command
from torch import Tensor
from torch.utils.data import DataLoader
from training import BATCH, lightly_step
from views import InMemory, lightly

POINTS = 8  # k-NN measurements a run
SHARE = 0.93  # of the time that steps may take; the rest is for k-NN and start
PILOT = 150
BANK = 10_000
TEMPERATURE, LR = {"simclr": 0.5, "moco_v2": 0.1}, {"simclr": 0.06, "moco_v2": 0.015}  # for BATCH images
Curve = list[tuple[float, float, int]]  # seconds of training, k-NN top-1, images seen


def ours(method: str, images: Path, out: Path, seconds: float) -> Curve:
    """`ssl-train` for as many steps as fit, by the speed of a short run before."""
    line = [
        command("ssl-train"),
        f"experiment=cifar10_{method}",
        "backbone=small",
        "dataset=folder",
        f"dataset.root={images}",
        "dataset.image_size=32",
        f"train.batch_size={BATCH}",
        *([f"method.bn_group={BATCH}"] if method == "moco_v2" else []),
    ]
    pilot = [f"train.max_steps={PILOT}", "train.log_every=10", "monitor.knn_every=0", f"run_dir={out / 'pilot'}"]
    subprocess.run([*line, *pilot, "resume=never"], check=True, stdout=subprocess.DEVNULL)
    rates = sorted(record["train/images_per_s"] for record in metrics(out / "pilot") if "train/images_per_s" in record)
    steps = int(SHARE * seconds * rates[len(rates) // 2] / BATCH)
    run = yaml.safe_load((out / "pilot" / "config.yaml").read_text())
    assert run["monitor"]["knn_images"] in (None, BANK), run["monitor"]
    epochs = max(1, round(steps * BATCH / 45_000 / POINTS))
    final = [f"train.max_steps={steps}", f"monitor.knn_every={epochs}", f"run_dir={out / method}", "resume=never"]
    subprocess.run([*line, *final], check=True, stdout=subprocess.DEVNULL)
    return [
        (record["wall"], record["monitor/knn_top1"], record["step"] * BATCH)
        for record in metrics(out / method)
        if "monitor/knn_top1" in record
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def theirs(method: str, images: Path, seconds: float) -> Curve:
    """lightly's example loop until the time is over."""
    from sslcli.data.sources.files import Folder

    source = Folder(root=str(images), image_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.262))
    net, width = small()
    clock = 0.0
    step = lightly_step(
        method,
        net,
        width,
        best=True,
        temperature=TEMPERATURE[method],
        lr=lambda: LR[method] * (1 + math.cos(math.pi * min(clock / seconds, 1.0))) / 2,
    )
    paths = [Path(source.path(int(position))) for position in source.splits["train"]]
    loader = DataLoader(
        InMemory(paths, lightly(32, blur=0.0)),
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
            curve.append((clock, top1(net, source), count * BATCH))
            print(curve[-1], file=sys.stderr, flush=True)
        if len(curve) == POINTS:
            break
    return curve


def top1(net: torch.nn.Module, source: Any) -> float:
    """k-NN of the features of a net by the protocol of the monitor."""
    from sslcli.evaluation.knn import Knn
    from sslcli.evaluation.online import bank_positions, collect
    from sslcli.nn.modules import evaluating

    def normalized(images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (source.mean, source.std))
        return (images - mean) / std

    with evaluating(net):
        found = collect(
            net,
            source,
            {"train": bank_positions(source, BANK), "val": source.splits["val"]},
            prepare=normalized,
            batch_size=512,
            device=torch.device("cpu"),
            precision="fp32",
        )
    return float(Knn()(found)["top1"])


def plot(curves: dict[str, Curve], out: Path) -> None:
    """Accuracy over minutes, a panel for each method."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, which is a fifth of the size
    from matplotlib import pyplot

    methods = sorted({name.split("/")[0] for name in curves})
    figure, panels = pyplot.subplots(1, len(methods), figsize=(4.5 * len(methods), 3.4), sharey=True, squeeze=False)
    for panel, method in zip(panels[0], methods, strict=True):
        for side, color in (("sslcli", "#1b6ca8"), ("lightly", "#b3541e")):
            if curve := curves.get(f"{method}/{side}"):
                minutes, accuracy = [point[0] / 60 for point in curve], [100 * point[1] for point in curve]
                panel.plot(minutes, accuracy, marker="o", markersize=3, color=color, label=side)
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
    parser.add_argument("--minutes", type=float, default=10.0, help="of each run (%(default)s)")
    parser.add_argument("--methods", nargs="*", default=list(TEMPERATURE), choices=list(TEMPERATURE))
    parser.add_argument("--lightly", metavar="METHOD", help=argparse.SUPPRESS)  # that side, in a process of its own
    options = parser.parse_args(arguments)
    if options.lightly:
        print(json.dumps(theirs(options.lightly, options.images, 60 * options.minutes)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / "curves.json"
    curves: dict[str, Curve] = json.loads(written.read_text()) if written.exists() else {}
    for method in options.methods:
        if f"{method}/sslcli" not in curves:
            curves[f"{method}/sslcli"] = ours(method, options.images, options.out, 60 * options.minutes)
            written.write_text(json.dumps(curves))
        if f"{method}/lightly" not in curves:
            line = [sys.executable, __file__, str(options.images), str(options.out), "--lightly", method]
            line += ["--minutes", str(options.minutes)]
            ended = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ) | TUNED)
            curves[f"{method}/lightly"] = json.loads(ended.stdout)
            written.write_text(json.dumps(curves))
    print("| run | minutes | images seen | k-NN |\n|---|---|---|---|")
    for name, curve in curves.items():
        seconds, accuracy, seen = curve[-1]
        print(f"| {name} | {seconds / 60:.1f} | {seen:,} | {100 * accuracy:.1f} |")
    plot(curves, options.out / "curves.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
