"""k-NN accuracy after each epoch: sslcli and lightly with the same recipe, seed, images and number of epochs.

    python scripts/bench/same_recipe.py IMAGES OUT --epochs 20 [--methods simclr moco_v2] [--limit 10000] [--threads 2]

IMAGES contains one folder per class of 32-pixel images. sslcli trains `experiment=cifar10_METHOD`. lightly trains the
classes of its package with the settings of its CIFAR-10 benchmark, which the recipe of sslcli has as well (see
docs/recipes.md). Both use bfloat16 if the processor supports it natively, and channels-last memory. A hash selects a
tenth of the images for k-NN; the networks are trained on the other images, or on `--limit` of them. sslcli computes the
k-NN accuracy for both: k 200, temperature 0.1, all training images as the bank.

The script prints a table and writes OUT/METHOD_LIBRARY.json. If it was stopped, the same command continues: with the
last checkpoint of a run of sslcli, or with the first step of a run of lightly.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy import knn_top1, metrics
from measure import ALLOCATOR_ENV, command
from torch import Tensor, nn
from torch.utils.data import DataLoader
from views import TransformedImages, lightly_transform

BATCH, LR, DECAY, MOMENTUM = 128, 0.06, 5e-4, 0.99
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in lightly's transforms
SPLITS = 8  # BatchNorm groups of MoCo v2
METHODS = ("simclr", "moco_v2")
Curve = list[tuple[int, float, float]]  # epoch, k-NN top-1, seconds of training


def sslcli_curve(
    method: str, images: Path, out: Path, *, epochs: int, limit: int | None, seed: int, threads: int
) -> Curve:
    """Run or resume `ssl-train` and return its curve. The seconds include the k-NN evaluations."""
    run_dir = out / method
    line = [
        command("ssl-train"),
        f"experiment=cifar10_{method}",
        "dataset=folder",
        f"dataset.root={images}",
        "dataset.image_size=32",
        "dataset.pretrain_on_val=false",
        f"dataset.limit={'null' if limit is None else limit}",
        f"train.epochs={epochs}",
        f"seed={seed}",
        "monitor.knn_k=200",
        "monitor.knn_temperature=0.1",
        "monitor.knn_images=null",
        f"launcher.threads={threads}",
        f"run_dir={run_dir}",
    ]
    subprocess.run(line, check=True)
    found = [record for record in metrics(run_dir) if "monitor/knn_top1" in record]
    return [(number, record["monitor/knn_top1"], record["wall"]) for number, record in enumerate(found, start=1)]


def lightly_curve(method: str, images: Path, *, epochs: int, limit: int | None, seed: int, threads: int) -> Curve:
    """Train with lightly and return its curve. The seconds do not include the k-NN evaluations."""
    from sslcli.data.sources.files import Folder
    from sslcli.engine import precision

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    source = Folder(root=str(images), image_size=32, mean=MEAN, std=STD, limit=limit)
    backbone, parts, loss_of = lightly_parts(method)
    parts.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [p for p in parts.parameters() if p.requires_grad], lr=LR, momentum=0.9, weight_decay=DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    paths = [Path(source.path(int(position))) for position in source.splits["train"]]
    loader = DataLoader(
        TransformedImages(paths, lightly_transform(32, blur=0.0)),
        batch_size=BATCH,
        num_workers=1,
        sampler=torch.utils.data.RandomSampler(paths),
        drop_last=True,
    )
    device = torch.device("cpu")
    dtype = precision.resolve("auto", device)
    curve: Curve = []
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        before = time.perf_counter()
        for views in loader:
            with precision.autocast(device, dtype):
                loss = loss_of(*(view.to(memory_format=torch.channels_last) for view in views))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        seconds += time.perf_counter() - before
        curve.append((epoch, knn_top1(backbone, source, k=200, temperature=0.1, bank=None), seconds))
        print(
            f"lightly {method}: epoch {epoch}, loss {float(loss.detach()):.4f}, k-NN {100 * curve[-1][1]:.1f} %",
            flush=True,
        )
    return curve


def lightly_parts(method: str) -> tuple[nn.Module, nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Return lightly's backbone, a module that contains all networks, and the loss of two views."""
    from lightly.loss import NTXentLoss
    from lightly.models import ResNetGenerator
    from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum

    resnet = ResNetGenerator("resnet-18", num_splits=SPLITS if method == "moco_v2" else 0)
    backbone = nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if method == "simclr":
        head = SimCLRProjectionHead(512, 512, 128)
        criterion = NTXentLoss(temperature=0.5)
        return (
            backbone,
            nn.ModuleList([backbone, head]),
            lambda x1, x2: criterion(head(backbone(x1)).float(), head(backbone(x2)).float()),
        )
    head = MoCoProjectionHead(512, 512, 128)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))
    key_backbone, key_head = copy.deepcopy(backbone), copy.deepcopy(head)
    for network in (key_backbone, key_head):
        deactivate_requires_grad(network)

    def direction(queries: Tensor, keys: Tensor) -> Tensor:
        query = head(backbone(queries))
        with torch.no_grad():
            shuffled, order = batch_shuffle(keys)
            key = batch_unshuffle(key_head(key_backbone(shuffled)), order)
        return criterion(query.float(), key.float())  # type: ignore[no-any-return]

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        update_momentum(backbone, key_backbone, MOMENTUM)
        update_momentum(head, key_head, MOMENTUM)
        return 0.5 * (direction(x1, x2) + direction(x2, x1))

    return backbone, nn.ModuleList([backbone, head, key_backbone, key_head]), loss


def table(curves: dict[str, Curve]) -> str:
    """Return a Markdown table of the k-NN accuracies in percent after each epoch, and the largest difference."""
    lines = ["| epoch | " + " | ".join(curves) + " |", "|---" * (1 + len(curves)) + "|"]
    for row in range(max(map(len, curves.values()))):
        cells = [f"{100 * curve[row][1]:.1f}" if row < len(curve) else "-" for curve in curves.values()]
        lines.append(f"| {row + 1} | " + " | ".join(cells) + " |")
    for method in METHODS:
        pair = [curves.get(f"{method}/{library}", []) for library in ("sslcli", "lightly")]
        apart = [100 * abs(a[1] - b[1]) for a, b in zip(*pair, strict=False)]
        if apart:
            lines.append(f"\n{method}: largest difference {max(apart):.1f} points, last {apart[-1]:.1f} points")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, help="number of training images (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each run (default: %(default)s)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--libraries", nargs="*", default=["sslcli", "lightly"], choices=("sslcli", "lightly"))
    parser.add_argument("--lightly", metavar="METHOD", help=argparse.SUPPRESS)  # train with lightly in this process
    options = parser.parse_args(arguments)
    common: dict[str, Any] = {name: getattr(options, name) for name in ("epochs", "limit", "seed", "threads")}
    if options.lightly:
        found = lightly_curve(options.lightly, options.images, **common)
        (options.out / f"{options.lightly}_lightly.json").write_text(json.dumps(found))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for method in options.methods:
        if "sslcli" in options.libraries:
            found = sslcli_curve(method, options.images, options.out, **common)
            (options.out / f"{method}_sslcli.json").write_text(json.dumps(found))
        if "lightly" in options.libraries and not (options.out / f"{method}_lightly.json").exists():
            line = [sys.executable, __file__, str(options.images), str(options.out), "--lightly", method]
            line += [word for name, value in common.items() if value is not None for word in (f"--{name}", str(value))]
            subprocess.run(line, check=True, env=dict(os.environ) | ALLOCATOR_ENV)
    print(table(read_curves(options.out)))
    return 0


def read_curves(out: Path) -> dict[str, Curve]:
    """Return the curves in OUT as method/library -> curve."""
    names = [(method, library) for method in METHODS for library in ("sslcli", "lightly")]
    paths = {f"{method}/{library}": out / f"{method}_{library}.json" for method, library in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
