"""Validation of the communication model: `python scripts/replay_communication.py COUNTS.json [--processes 2,4,8]`

The script times single gloo collectives on this machine and fits a latency, a cost per message and a cost per byte to
the times with all numbers of processes except the last. From these costs it predicts, for every number of processes,
the time of all collectives of a step that count_communication.py counted. Then it replays these collectives and prints
the predicted and the measured time. The processes share the cores of one machine, so the cost per byte applies to the
sum of the bytes of all processes. Times are means of several repeats.
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
from gloo import run_processes
from sslcli.distributed import collectives
from step_time import read_traffic

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
SIZES = (64, 1 << 12, 1 << 16, 1 << 20, 1 << 22)  # input bytes of a process
REPEATS = 30
CASES = ("simclr", "moco_v2", "byol", "memory_bank")
IMAGES = 16  # images per process


def collective_of(kind: str, size: int) -> Callable[[], object]:
    """Return a function that calls a collective with about `size` input bytes of this process."""
    world_size = collectives.world_size()
    local = torch.zeros(max(1, size // 4))
    if kind == "all-reduce":
        return lambda: dist.all_reduce(local)
    if kind == "all-gather":
        return lambda: collectives.all_gather(local)
    if kind == "reduce-scatter":
        whole = torch.zeros(world_size * len(local))
        return lambda: collectives._reduce_scatter(local, whole)
    part = max(1, len(local) // world_size)
    rows = torch.zeros(world_size * part)
    return lambda: collectives.exchange(rows, [part] * world_size, [part] * world_size)


def mean_seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the mean time of a function that all processes call at the same time."""
    function()
    times = []
    for _ in range(repeats):
        collectives.barrier()
        before = time.perf_counter()
        function()
        times.append(time.perf_counter() - before)
    return sum(times) / len(times)


def time_collectives() -> dict[tuple[str, int], float]:
    """Return the seconds of each collective for each size."""
    return {(kind, size): mean_seconds(collective_of(kind, size)) for kind in KINDS for size in SIZES}


def time_steps(steps: list[dict[str, Traffic]]) -> list[float]:
    """Return the seconds of each step's collectives, called one after the other."""
    times = []
    for step in steps:
        calls = []
        for traffic in step.values():
            size = traffic.sent(IMAGES) // max(1, traffic.calls)
            calls += [collective_of(traffic.collective, size)] * traffic.calls
        times.append(mean_seconds(lambda calls=calls: [call() for call in calls], repeats=10))  # type: ignore[misc]
    return times


def features(kind: str, size: int, processes: int) -> tuple[float, float, float]:
    """Return the terms of a collective's time: 1 (start), number of sequential messages, bytes of all processes."""
    traffic = Traffic(kind, 1, size, 0)
    messages = {"all-reduce": 2 * (processes - 1)}.get(kind, processes - 1)
    return 1.0, float(messages), processes * traffic.link_bytes(0, processes)


def fit_coefficients(times: dict[int, dict[tuple[str, int], float]]) -> dict[str, np.ndarray]:
    """Fit the seconds per start, message and byte of each kind of collective.

    The fit minimizes the squares of the relative errors, with non-negative coefficients.

    Args:
        times: number of processes -> (kind, size) -> seconds.
    """
    coefficients = {}
    for kind in KINDS:
        rows = [(features(kind, size, n), t) for n in times for (k, size), t in times[n].items() if k == kind]
        matrix = np.array([np.array(x) / t for x, t in rows])
        best, lowest_error = np.zeros(3), np.inf
        for columns in ((0, 1, 2), (0, 2), (1, 2), (2,)):  # non-negative least squares by trying subsets of the terms
            part, *_ = np.linalg.lstsq(matrix[:, columns], np.ones(len(rows)), rcond=None)
            error = float(np.square(matrix[:, columns] @ part - 1).sum())
            if (part >= 0).all() and error < lowest_error:
                best, lowest_error = np.zeros(3), error
                best[list(columns)] = part
        coefficients[kind] = best
    return coefficients


def predict(step: dict[str, Traffic], coefficients: dict[str, np.ndarray], processes: int) -> float:
    """Return the predicted seconds of all collectives of a step."""
    total = 0.0
    for traffic in step.values():
        size = traffic.sent(IMAGES) // max(1, traffic.calls)
        terms = features(traffic.collective, size, processes)
        total += traffic.calls * float(coefficients[traffic.collective] @ terms)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path, metavar="COUNTS.json", help="output of count_communication.py --json")
    parser.add_argument("--processes", default="2,4,8", help="numbers of processes (default: %(default)s)")
    arguments = parser.parse_args()
    sizes = [int(number) for number in arguments.processes.split(",")]
    steps = read_traffic(arguments.counts)
    coefficients = fit_coefficients({n: run_processes(n, time_collectives)[0] for n in sizes[:-1]})
    for kind, (start, message, byte) in coefficients.items():
        bandwidth = f"{1e-9 / byte:.1f} GB/s" if byte else "-"
        print(f"{kind}: {1e6 * start:.0f} us per start, {1e6 * message:.0f} us per message, {bandwidth} in total")
    print("\n| case | processes | predicted | measured | predicted / measured |\n|---|---|---|---|---|")
    for n in sizes:
        times = run_processes(n, time_steps, [steps[case] for case in CASES])[0]
        for case, measured in zip(CASES, times, strict=True):
            predicted = predict(steps[case], coefficients, n)
            ratio = predicted / measured
            print(f"| {case} | {n} | {1e3 * predicted:.1f} ms | {1e3 * measured:.1f} ms | {ratio:.2f} |")


if __name__ == "__main__":
    main()
