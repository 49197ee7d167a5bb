"""What the benchmarks time with: one piece of work in one process, of which one JSON object is printed."""

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
Work = Callable[[], Result]

# The allocator settings a careful user of a peer exports; sslcli sets its own.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "67108864"}


def timed(
    step: Callable[[], object],
    *,
    images: int,
    seconds: float = 12.0,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Repeat `step`, which handles so many source images, for about `seconds` of `clock`; the median counts."""
    for _ in range(warmup):
        step()
    times: list[float] = []
    while not enough(times, seconds):
        before = clock()
        step()
        times.append(clock() - before)
    return summary(times, images=images)


def enough(times: Sequence[float], seconds: float) -> bool:
    """Whether no further step is to be timed."""
    return bool(times) and (sum(times) >= seconds or len(times) >= 200)


def summary(times: Sequence[float], *, images: int) -> Result:
    """The figures of steps that took so long."""
    median = statistics.median(times)
    return {"images_per_s": images / median, "ms": 1e3 * median, "steps": len(times)}


def command(name: str) -> str:
    """The console script beside this Python."""
    return str(Path(sys.executable).with_name(name))


def trained(*overrides: str, steps: int) -> Result:
    """`ssl-train` for so many steps: the median of the images a second that it writes down for each sixth of them.

    The first sixth does not count.
    """
    with tempfile.TemporaryDirectory() as run_dir:
        line = [command("ssl-train"), *overrides, "monitor.knn_every=0", f"run_dir={run_dir}"]
        line += [f"train.max_steps={steps}", f"train.log_every={steps // 6}"]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/images_per_s"] for line in lines if "train/images_per_s" in line]
    return {"images_per_s": statistics.median(rates[1:])}


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def answer(work: Mapping[str, Work]) -> None:
    """Do the work named on the command line and print its figures; with PROFILE set, a trace and a table as well."""
    name = sys.argv[1]
    trace = os.environ.get("PROFILE")
    if trace:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            result = work[name]()
        profiler.export_chrome_trace(trace)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)
    else:
        result = work[name]()
    print(json.dumps(result | {"peak_mb": peak_mb()}))
