"""Speed of ssl-embed relative to the bare forward pass of the same network.

    python scripts/bench/embed.py FOLDER --images 50000 --rounds 3

Each round measures two sides, in alternating order:

forward   a loop over batches of float images that are already in memory, normalized and in channels-last layout
embed     ssl-embed without its start: read and decode the files, normalize, forward pass, part files, final npy file

The table shows images per second, and the ratio of the sides in each round. The network has random weights.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sslcli.data.loader import plain_batches
from sslcli.distributed import devices
from sslcli.engine.precision import autocast
from sslcli.evaluation import layers
from sslcli.nn.modes import evaluating
from sslcli.report.console import Screen
from sslcli.runs.build import build_backbone
from sslcli.runs.embed import extract, finish
from sslcli.runs.embedding import Embedding, prepare
from sslcli.runs.embedding_parts import Parts
from sslcli.runs.encoder import network_config
from sslcli.system.cpu import limit_spinning
from sslcli.system.memory import keep_freed_memory

MAX_BATCHES = 8  # batches in memory, which the forward side repeats


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder of image files")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--workers", type=int, help="by default, as ssl-embed chooses it")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    limit_spinning()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        embedding = build(Path(folder), arguments)
        batches = list(inputs(embedding))
        forward(embedding, batches[:1], len(batches[0]))  # the first pass is slower
        ratios = []
        for number in range(arguments.rounds):
            sides = {}
            for side in ("forward", "embed") if number % 2 == 0 else ("embed", "forward"):
                started = time.perf_counter()
                if side == "forward":
                    forward(embedding, batches, embedding.total)
                else:
                    embed(embedding, Path(folder) / f"{number}.npy")
                sides[side] = embedding.total / (time.perf_counter() - started)
            ratios.append(sides["embed"] / sides["forward"])
            print(
                f"round {number + 1}: forward {sides['forward']:.0f} images/s, embed {sides['embed']:.0f} images/s, "
                f"ratio {ratios[-1]:.3f}",
                flush=True,
            )
        print(f"median ratio {statistics.median(ratios):.3f} with {embedding.total:,} images on {embedding.device}")


def build(folder: Path, arguments: argparse.Namespace) -> Embedding:
    """Return the network with random weights, and the first images of the folder."""
    node = {
        "_target_": "sslcli.backbones.resnet.ResNet",
        "arch": arguments.arch,
        "image_size": arguments.image_size,
        "stem": "auto",
    }
    weights = folder / "weights.pt"
    torch.save(build_backbone(node, image_size=arguments.image_size, trust=[]).state_dict(), weights)
    device = devices.pick_device(arguments.device)
    devices.prepare(device, deterministic=True)
    config = network_config(
        weights,
        backbone=node,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )
    dataset = {
        "_target_": "sslcli.data.sources.files.Flat",
        "root": str(arguments.folder),
        "image_size": arguments.image_size,
        "limit": arguments.images,
        "workers": None,
    }
    with Screen(silent=True) as screen:
        return prepare(replace(config, dataset=dataset), device, screen, images=None, split="train")


def inputs(embedding: Embedding) -> Iterator[Tensor]:
    """Yield the first batches as inputs of the network."""
    size, positions = embedding.config.batch_size, embedding.splits["train"]
    loaded = plain_batches(embedding.source, positions[: size * MAX_BATCHES], batch_size=size, workers=0)
    for images, _ in loaded:
        prepared = embedding.subject.prepare(images.to(embedding.device).float() / 255)
        yield prepared.contiguous(memory_format=torch.channels_last)


def forward(embedding: Embedding, batches: list[Tensor], images: int) -> None:
    """Compute the features of batches, repeated until they contain `images` images."""
    repeated = itertools.cycle(batches)
    with evaluating(embedding.net), torch.inference_mode(), autocast(embedding.device, embedding.subject.precision):
        while images > 0:
            batch = next(repeated)
            images -= len(layers.read(embedding.net, embedding.config.feature_layer, batch[:images]).cpu())


def embed(embedding: Embedding, out: Path) -> None:
    """Embed the images and write the npy file, as ssl-embed does."""
    with Screen(silent=True) as screen, Parts(out.with_suffix(".parts"), embedding.identity()) as parts:
        extract(embedding, parts, screen)
        finish(out, embedding, parts, embedding.provenance())


if __name__ == "__main__":
    main()
