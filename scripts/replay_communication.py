"""Is the model of collectives right? `python scripts/replay_communication.py COUNTS.json [--processes 2,4,8]`

Times single collectives of gloo here, fits a latency and a bandwidth to the smaller numbers of processes, and
predicts with them what a whole step takes, as counted by count_communication.py, on every number. Then it
replays these collectives and prints both. Processes share the cores of one machine, so bytes are counted for all of
them together, and times are means of several repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from count_communication import Traffic
from gloo import together
from sslcli.distributed import collectives
from step_time import counts

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
SIZES = (64, 1 << 12, 1 << 16, 1 << 20, 1 << 22)  # bytes a process contributes
REPEATS = 30
CASES = ("simclr", "moco_v2", "byol", "memory_bank")
IMAGES = 16  # a process


def work_of(kind: str, size: int) -> Callable[[], object]:
    """A collective to which this process contributes about `size` bytes."""
    world = collectives.world_size()
    mine = torch.zeros(max(1, size // 4))
    if kind == "all-reduce":
        return lambda: dist.all_reduce(mine)
    if kind == "all-gather":
        return lambda: collectives.all_gather(mine)
    if kind == "reduce-scatter":
        everyone = torch.zeros(world * len(mine))
        return lambda: collectives._reduce_scatter(mine, everyone)
    part = max(1, len(mine) // world)
    rows = torch.zeros(world * part)
    return lambda: collectives.exchange(rows, [part] * world, [part] * world)


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The mean time of `work`, all processes starting together: a step meets the busy moments too."""
    work()
    times = []
    for _ in range(repeats):
        collectives.barrier()
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return sum(times) / len(times)


def time_singles() -> dict[tuple[str, int], float]:
    return {(kind, size): seconds(work_of(kind, size)) for kind in KINDS for size in SIZES}


def time_steps(steps: list[dict[str, Traffic]]) -> list[float]:
    """Seconds of each step's collectives, one after the other."""
    found = []
    for traffic in steps:
        works = []
        for law in traffic.values():
            each = law.sent(IMAGES) // max(1, law.calls)
            works += [work_of(law.collective, each)] * law.calls
        found.append(seconds(lambda works=works: [work() for work in works], repeats=10))  # type: ignore[misc]
    return found


def features(kind: str, size: int, processes: int) -> tuple[float, float, float]:
    """A start, messages one after the other, and bytes moved by all processes: what a collective's time is made of."""
    law = Traffic(kind, 1, size, 0)
    rounds = {"all-reduce": 2 * (processes - 1)}.get(kind, processes - 1)
    return 1.0, float(rounds), processes * law.through_the_link(0, processes)


def fitted(found: dict[int, dict[tuple[str, int], float]]) -> dict[str, np.ndarray]:
    """Seconds a start, a message and a byte, of each kind: least squares of relative errors, none below zero."""
    coefficients = {}
    for kind in KINDS:
        rows = [(features(kind, size, n), t) for n in found for (k, size), t in found[n].items() if k == kind]
        matrix = np.array([np.array(x) / t for x, t in rows])
        best, least = np.zeros(3), np.inf
        for kept in ((0, 1, 2), (0, 2), (1, 2), (2,)):  # the best of those without negative parts
            part, *_ = np.linalg.lstsq(matrix[:, kept], np.ones(len(rows)), rcond=None)
            error = float(np.square(matrix[:, kept] @ part - 1).sum())
            if (part >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[list(kept)] = part
        coefficients[kind] = best
    return coefficients


def predicted(traffic: dict[str, Traffic], coefficients: dict[str, np.ndarray], processes: int) -> float:
    total = 0.0
    for law in traffic.values():
        each = law.sent(IMAGES) // max(1, law.calls)
        total += law.calls * float(coefficients[law.collective] @ features(law.collective, each, processes))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path)
    parser.add_argument("--processes", default="2,4,8")
    arguments = parser.parse_args()
    sizes = [int(number) for number in arguments.processes.split(",")]
    steps = counts(arguments.counts)
    singles = {n: together(n, time_singles)[0] for n in sizes[:-1]}
    coefficients = fitted(singles)
    for kind, (start, message, byte) in coefficients.items():
        speed = f"{1e-9 / byte:.1f} GB/s" if byte else "-"
        print(f"{kind}: {1e6 * start:.0f} us a start, {1e6 * message:.0f} us a message, {speed} in all")
    print("\n| case | processes | predicted | measured | predicted / measured |\n|---|---|---|---|---|")
    for n in sizes:
        measured = together(n, time_steps, [steps[case] for case in CASES])[0]
        for case, seen in zip(CASES, measured, strict=True):
            told = predicted(steps[case], coefficients, n)
            print(f"| {case} | {n} | {1e3 * told:.1f} ms | {1e3 * seen:.1f} ms | {told / seen:.2f} |")


if __name__ == "__main__":
    main()
