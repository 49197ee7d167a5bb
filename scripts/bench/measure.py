"""Functions for benchmarks, each of which runs in its own process and prints its results as one JSON object."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Result = dict[str, float]
Benchmark = Callable[[], Result]

# Allocator settings (glibc) of the variants called "best": keep freed memory. sslcli has its own settings.
ALLOCATOR_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "67108864"}


def timed(
    step: Callable[[], object],
    *,
    images: int,
    seconds: float = 12.0,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Repeat `step` for about `seconds` of `clock` and return the median time.

    Args:
        step: function that processes `images` source images.
        images: number of source images per step.
        seconds: time to measure.
        warmup: steps before the measurement.
        clock: function that returns the time in seconds.

    Returns:
        images_per_s, ms (per step) and steps (number of timed steps).
    """
    for _ in range(warmup):
        step()
    times: list[float] = []
    while not is_long_enough(times, seconds):
        before = clock()
        step()
        times.append(clock() - before)
    return summary(times, images=images)


def is_long_enough(times: Sequence[float], seconds: float) -> bool:
    """Return True if the timed steps took `seconds` in total, or if there are 200 of them."""
    return bool(times) and (sum(times) >= seconds or len(times) >= 200)


def summary(times: Sequence[float], *, images: int) -> Result:
    """Return the results of steps of `images` images that took `times` seconds: medians, and the number of steps."""
    median = statistics.median(times)
    return {"images_per_s": images / median, "ms": 1e3 * median, "steps": len(times)}


def command(name: str) -> str:
    """Return the path of a console script in the environment of this interpreter."""
    return str(Path(sys.executable).with_name(name))


def train_throughput(*overrides: str, steps: int) -> Result:
    """Run `ssl-train` for `steps` steps and return the median of its `train/images_per_s`.

    This scalar is logged six times; the first value is ignored.
    """
    with tempfile.TemporaryDirectory() as run_dir:
        line = [command("ssl-train"), *overrides, "monitor.knn_every_epochs=0", f"run_dir={run_dir}"]
        line += [f"train.max_steps={steps}", f"train.log_every_steps={steps // 6}"]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/images_per_s"] for line in lines if "train/images_per_s" in line]
    return {"images_per_s": statistics.median(rates[1:])}


def peak_mb() -> float:
    """Return the peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_benchmark(benchmarks: Mapping[str, Benchmark]) -> None:
    """Run the benchmark named on the command line and print its results as JSON.

    If the environment variable PROFILE is set, also write a trace to that file and print a table of the operations.
    """
    name = sys.argv[1]
    trace = os.environ.get("PROFILE")
    if trace:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            result = benchmarks[name]()
        profiler.export_chrome_trace(trace)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)
    else:
        result = benchmarks[name]()
    print(json.dumps(result | {"peak_mb": peak_mb()}))
