"""Benchmark of sslcli, lightly and stable-pretraining on the same tasks, run by `make bench`.

    python scripts/bench/run.py [--only WORD ...] [--repeats 3] [--json FILE]
    python scripts/bench/run.py --profile training.py simclr/sslcli

Each measurement runs in a new process, and the libraries alternate. The table shows the median and the range over the
repeats, and the ratio of the medians of sslcli and the other library. If the ratio is above 1, sslcli is better.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from attention import TASKS as ATTENTION_TASKS
from convolution import SIDES
from measure import ALLOCATOR_ENV
from workload import METHODS

from sslcli.engine import precision
from sslcli.system.cpu import SPINS

HERE = Path(__file__).parent
LOWER_IS_BETTER = ("ms", "s", "extra_mb", "peak_mb", "multiple", "cpu_multiple")


class Task(NamedTuple):
    """A benchmark of one script, its variants (libraries and settings), and the metrics to report."""

    script: str
    name: str
    variants: tuple[str, ...]
    metrics: tuple[str, ...]


PEERS = {"lightly": "lightly", "stable-pretraining": "stable_pretraining"}  # library -> name of its package
STEP_VARIANTS = ("sslcli", "sslcli fp32", "lightly", "lightly best")
ALL_STEP_VARIANTS = (*STEP_VARIANTS, "stable-pretraining", "stable-pretraining best")
TASKS = [
    *(Task("training.py", method, ALL_STEP_VARIANTS, ("images_per_s", "peak_mb")) for method in METHODS),
    *(
        Task("vision_transformer.py", method, ("sslcli", "plain loop", "plain loop best"), ("images_per_s", "peak_mb"))
        for method in ("mae", "simmim", "ijepa", "ibot", "dinov2")
    ),
    Task(
        "vision_transformer.py",
        "dino",
        ("sslcli", "view by view", "plain loop", "plain loop best"),
        ("images_per_s", "peak_mb"),
    ),
    *(Task("convolution.py", f"channels_{n}", ("sslcli", "torch"), ("ms",)) for n in SIDES),
    *(Task("attention.py", name, ("sslcli", "fused", "two products"), ("ms",)) for name in ATTENTION_TASKS),
    *(
        Task("end_to_end.py", f"{method}_{net}", STEP_VARIANTS, ("images_per_s",))
        for net in ("resnet18", "small")
        for method in METHODS
    ),
    Task("views.py", "memory_32", ("sslcli", "lightly", "torchvision"), ("images_per_s",)),
    Task("views.py", "crops_224", ("sslcli", "torchvision"), ("images_per_s",)),
    Task("views.py", "simclr_224", ("sslcli", "lightly"), ("images_per_s",)),
    *(
        Task("losses.py", f"nt_xent_{n}", ("sslcli", *PEERS, "plain torch"), ("ms", "extra_mb"))
        for n in (256, 1024, 4096)
    ),
    Task("losses.py", "queue", ("sslcli", "lightly"), ("ms", "extra_mb")),
    Task("evaluation.py", "knn", ("sslcli", "lightly"), ("ms",)),
    *(
        Task("evaluation.py", name, ("sslcli",), ("multiple", "cpu_multiple"))
        for name in ("linear", "linear_baselines")
    ),
    Task("engine.py", "small", ("sslcli", "bare loop"), ("images_per_s",)),
    Task("engine.py", "resnet18", ("sslcli", "bare loop"), ("images_per_s",)),
    Task("startup.py", "help", ("sslcli", *PEERS), ("s",)),
    Task("startup.py", "first_step", ("sslcli", *PEERS), ("s",)),
]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="run the tasks whose script or name contains a word")
    parser.add_argument("--repeats", type=int, default=3, help="processes per variant (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    parser.add_argument(
        "--profile", nargs=2, metavar=("SCRIPT", "TASK/VARIANT"), help="profile one benchmark: trace.json and a table"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sslcli-bench-") as folder:
        os.environ.setdefault("BENCH_FOLDER", folder)
        if options.profile:
            script, name = options.profile
            command = [sys.executable, script, name]
            return subprocess.run(command, cwd=HERE, env=environment(name, trace=True)).returncode
        tasks = [t for t in TASKS if not options.only or any(w in f"{t.script} {t.name}" for w in options.only)]
        records = [record for task in tasks for record in measure(task, options.repeats)]
    print("\n".join(table(tasks, records)))
    if options.json:
        options.json.write_text(json.dumps({"machine": platform.uname()._asdict(), "results": records}, indent=1))
    return 0


def environment(variant: str, *, trace: bool = False) -> dict[str, str]:
    """Return the environment of a process: allocator settings for "best" variants, sslcli's settings for sslcli."""
    added = (
        ALLOCATOR_ENV if variant.endswith("best") else SPINS if variant.startswith(("sslcli", "bare", "view")) else {}
    )
    return dict(os.environ) | added | ({"PROFILE": str(Path("trace.json").absolute())} if trace else {})


def measure(task: Task, repeats: int) -> Iterator[dict[str, object]]:
    """Run all variants of a task alternately, `repeats` times, and yield their results.

    Libraries that are not installed are skipped. `sslcli fp32` is skipped if `precision=auto` selects fp32.
    """
    skipped = [name for peer, package in PEERS.items() if not find_spec(package) for name in (peer, f"{peer} best")]
    skipped += ["sslcli fp32"] if precision.resolve("auto", torch.device("cpu")) == "fp32" else []
    variants = [variant for variant in task.variants if variant not in skipped]
    for repeat in range(repeats):
        for variant in variants if repeat % 2 == 0 else variants[::-1]:
            command = [sys.executable, task.script, f"{task.name}/{variant}"]
            process = subprocess.run(command, cwd=HERE, env=environment(variant), capture_output=True, text=True)
            if process.returncode:
                print(f"{task.name}/{variant} failed: {process.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            print(f"{task.script} {task.name}/{variant}: {process.stdout.strip()}", file=sys.stderr, flush=True)
            yield {"task": task.name, "script": task.script, "variant": variant, **json.loads(process.stdout)}


def table(tasks: Sequence[Task], records: Sequence[dict[str, object]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: one row per task, metric and variant, with the ratio to sslcli."""
    yield "| task | metric | variant | median | range | sslcli is better by |"
    yield "|---|---|---|---|---|---|"
    for task in tasks:
        for metric in task.metrics:
            medians: dict[str, float] = {}
            for variant in task.variants:
                values = [
                    float(str(record[metric]))
                    for record in records
                    if (record["script"], record["task"], record["variant"]) == (task.script, task.name, variant)
                ]
                if not values:
                    continue
                medians[variant] = statistics.median(values)
                ratio = medians["sslcli"] / medians[variant] if "sslcli" in medians else float("nan")
                improvement = 1 / ratio if metric in LOWER_IS_BETTER else ratio
                cell = "" if variant == "sslcli" else f"{improvement:.2f}x"
                spread = f"{min(values):.4g} to {max(values):.4g}"
                yield f"| {task.name} | {metric} | {variant} | {medians[variant]:.4g} | {spread} | {cell} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
