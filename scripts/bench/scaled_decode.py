"""What scaled decoding saves and changes: two random crops of each JPEG of a folder, by size of the crops.

    python scripts/bench/scaled_decode.py FOLDER [--sizes 32 64 96 128 224]

The difference is the mean absolute one of the views, of 255, against cutting them from images decoded whole.
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
    print("| size | share decoded smaller | ms an image, whole | ms, scaled | difference |\n|---|---|---|---|---|")
    for size in options.sizes:
        made = {scaled: workers(options.folder, size, scaled=scaled) for scaled in (False, True)}
        seconds = {False: 0.0, True: 0.0}
        total = count = smaller = 0.0
        images = min(options.images, len(made[True].source))
        for piece in torch.split(torch.arange(images), 20):
            request = Request(piece, torch.zeros_like(piece), torch.zeros(len(piece), dtype=torch.bool))
            found = {}
            for scaled, worker in made.items():
                before = time.process_time()
                _, found[scaled], _, _ = worker[request]
                seconds[scaled] += time.process_time() - before
            for one, other in zip(found[False], found[True], strict=True):
                apart = (one.int() - other.int()).abs().float()
                total, count = total + apart.sum().item(), count + apart.numel()
                smaller += (apart.flatten(1).amax(1) > 0).sum().item() / len(found[True])
        whole, scaled = (1e3 * seconds[kind] / images for kind in (False, True))
        print(f"| {size} | {smaller / images:.0%} | {whole:.2f} | {scaled:.2f} | {total / count:.2f} |")


def workers(folder: Path, size: int, *, scaled: bool) -> ViewCrops:
    source = Flat(root=str(folder), image_size=size, scaled_decode=scaled)
    return ViewCrops(source, Views([{"count": 2}]), seed=0)


if __name__ == "__main__":
    main()
