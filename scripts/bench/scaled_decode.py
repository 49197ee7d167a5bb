"""Benchmark of scaled decoding: time saved and difference in pixels, for two random crops of each JPEG of a folder.

    python scripts/bench/scaled_decode.py FOLDER [--sizes 32 64 96 128 224]

The results are listed by crop size. The difference is the mean absolute difference from crops of images that are
decoded at full size, on a scale of 0 to 255.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from sslcli.data.crops import Request, ViewCrops
from sslcli.data.sources.files import Flat
from sslcli.data.views.views import Views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs="*", default=[32, 64, 96, 128, 224])
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| crop size | decoded at reduced size | ms per image, full size | ms per image, scaled | difference |")
    print("|---|---|---|---|---|")
    for size in options.sizes:
        croppers = {scaled: cropper(options.folder, size, scaled=scaled) for scaled in (False, True)}
        seconds = {False: 0.0, True: 0.0}
        total = count = num_reduced = 0.0
        images = min(options.images, len(croppers[True].source))
        for piece in torch.split(torch.arange(images), 20):
            request = Request(piece, torch.zeros_like(piece), torch.zeros(len(piece), dtype=torch.bool))
            crops = {}
            for scaled, view_crops in croppers.items():
                before = time.process_time()
                _, crops[scaled], _, _ = view_crops[request]
                seconds[scaled] += time.process_time() - before
            for full, reduced in zip(crops[False], crops[True], strict=True):
                difference = (full.int() - reduced.int()).abs().float()
                total, count = total + difference.sum().item(), count + difference.numel()
                num_reduced += (difference.flatten(1).amax(1) > 0).sum().item() / len(crops[True])
        ms_full, ms_scaled = (1e3 * seconds[scaled] / images for scaled in (False, True))
        print(f"| {size} | {num_reduced / images:.0%} | {ms_full:.2f} | {ms_scaled:.2f} | {total / count:.2f} |")


def cropper(folder: Path, size: int, *, scaled: bool) -> ViewCrops:
    """Return a dataset of two random crops of `size` pixels of each image, with or without scaled decoding."""
    source = Flat(root=str(folder), image_size=size, scaled_decode=scaled)
    return ViewCrops(source, Views([{"count": 2}]), seed=0)


if __name__ == "__main__":
    main()
