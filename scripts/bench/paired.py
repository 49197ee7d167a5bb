"""Benchmark of one step of sslcli against lightly's best, alternated in one process, which noise affects less.

    python scripts/bench/paired.py moco_v2 [--bn-group 128] [--pairs 24]

The steps are those of `training.py`. The output is the median of the ratio of the two times of a pair, and its
quartiles. If the ratio is above 1, sslcli is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from measure import ALLOCATOR_ENV
from training import build_lightly_step, build_sslcli_step
from workload import BATCH, METHODS, cifar_resnet18, random_views


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument(
        "--bn-group", type=int, default=None, help="images per BatchNorm group of MoCo v2 (default: all)"
    )
    parser.add_argument("--pairs", type=int, default=24, help="pairs of steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not set(ALLOCATOR_ENV) <= set(os.environ):  # glibc reads these variables when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR_ENV)
    ours = build_sslcli_step(options.method, "auto", bn_group=options.bn_group)
    theirs, views = build_lightly_step(options.method, cifar_resnet18(), 512, best=True), random_views()
    ratios = paired_ratios(ours, lambda: theirs(views), options.pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{options.method}, {BATCH} images, {options.pairs} pairs: {middle:.2f} ({low:.2f} to {high:.2f})")
    return 0


def paired_ratios(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> list[float]:
    """Return the time of `theirs` divided by the time of `ours` for each pair. Which step is first alternates."""
    ours()
    theirs()
    ratios = []
    for pair in range(pairs):
        seconds = {step: elapsed(step) for step in ((ours, theirs) if pair % 2 else (theirs, ours))}
        ratios.append(seconds[theirs] / seconds[ours])
    return ratios


def elapsed(step: Callable[[], object]) -> float:
    """Return the time of one step in seconds."""
    before = time.perf_counter()
    step()
    return time.perf_counter() - before


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
