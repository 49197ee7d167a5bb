"""Run sslcli and its peers on the same work, alternating, each time in a fresh process; print ratios; `make bench`.

    python scripts/bench/run.py [--only WORD ...] [--repeats 3] [--json FILE]
    python scripts/bench/run.py --profile training.py simclr/sslcli

Medians over the repeats, with their range. A ratio is the median of sslcli over that of the peer, turned so that above
1 sslcli is ahead.
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
from convolution import SIDES
from measure import TUNED

from sslcli.engine import precision
from sslcli.system.idle_threads import SPINS

HERE = Path(__file__).parent
LOWER_IS_BETTER = ("ms", "s", "extra_mb", "peak_mb", "multiple", "cpu_multiple")


class Task(NamedTuple):
    """One piece of work, done by several sides."""

    script: str
    work: str
    sides: tuple[str, ...]
    figures: tuple[str, ...]


PEERS = {"lightly": "lightly", "stable-pretraining": "stable_pretraining"}  # and what they are imported as
STEP_SIDES = ("sslcli", "sslcli fp32", "lightly", "lightly best")
ALL_STEP_SIDES = (*STEP_SIDES, "stable-pretraining", "stable-pretraining best")
TASKS = [
    *(Task("training.py", m, ALL_STEP_SIDES, ("images_per_s", "peak_mb")) for m in ("simclr", "moco_v2", "byol")),
    *(Task("convolution.py", f"channels_{n}", ("sslcli", "torch"), ("ms",)) for n in SIDES),
    *(
        Task("end_to_end.py", f"{method}_{net}", STEP_SIDES, ("images_per_s",))
        for net in ("resnet18", "small")
        for method in ("simclr", "moco_v2", "byol")
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
        Task("evaluation.py", work, ("sslcli",), ("multiple", "cpu_multiple"))
        for work in ("linear", "linear_baselines")
    ),
    Task("engine.py", "small", ("sslcli", "bare loop"), ("images_per_s",)),
    Task("engine.py", "resnet18", ("sslcli", "bare loop"), ("images_per_s",)),
    Task("startup.py", "help", ("sslcli", *PEERS), ("s",)),
    Task("startup.py", "first_step", ("sslcli", *PEERS), ("s",)),
]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="tasks whose script or work has one of these words")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes a side (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    parser.add_argument("--profile", nargs=2, metavar=("SCRIPT", "WORK/SIDE"), help="trace.json and a table of one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sslcli-bench-") as folder:
        os.environ.setdefault("BENCH_FOLDER", folder)
        if options.profile:
            script, work = options.profile
            return subprocess.run(
                [sys.executable, script, work], cwd=HERE, env=environment(work, trace=True)
            ).returncode
        wanted = [t for t in TASKS if not options.only or any(w in f"{t.script} {t.work}" for w in options.only)]
        found = [record for task in wanted for record in measure(task, options.repeats)]
    print("\n".join(table(wanted, found)))
    if options.json:
        options.json.write_text(json.dumps({"machine": platform.uname()._asdict(), "figures": found}, indent=1))
    return 0


def environment(side: str, *, trace: bool = False) -> dict[str, str]:
    """Of a process; a peer at its best gets the allocator that its user would set, sslcli what its commands set."""
    added = TUNED if side.endswith("best") else SPINS if side.startswith(("sslcli", "bare")) else {}
    return dict(os.environ) | added | ({"PROFILE": str(Path("trace.json").absolute())} if trace else {})


def measure(task: Task, repeats: int) -> Iterator[dict[str, object]]:
    """The figures of every side of a task, the sides taking turns.

    A peer that is not installed is left out, and so is `sslcli fp32` where that is what `auto` means.
    """
    left_out = [side for peer, package in PEERS.items() if not find_spec(package) for side in (peer, f"{peer} best")]
    left_out += ["sslcli fp32"] if precision.resolve("auto", torch.device("cpu")) == "fp32" else []
    sides = [side for side in task.sides if side not in left_out]
    for repeat in range(repeats):
        for side in sides if repeat % 2 == 0 else sides[::-1]:
            line = [sys.executable, task.script, f"{task.work}/{side}"]
            ended = subprocess.run(line, cwd=HERE, env=environment(side), capture_output=True, text=True)
            if ended.returncode:
                print(f"{task.work}/{side} failed: {ended.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            print(f"{task.script} {task.work}/{side}: {ended.stdout.strip()}", file=sys.stderr, flush=True)
            yield {"work": task.work, "script": task.script, "side": side, **json.loads(ended.stdout)}


def table(tasks: Sequence[Task], found: Sequence[dict[str, object]]) -> Iterator[str]:
    """Markdown: a row for each task, side and figure, with sslcli's ratio to that side."""
    yield "| work | figure | side | median | range | sslcli is ahead by |"
    yield "|---|---|---|---|---|---|"
    for task in tasks:
        for figure in task.figures:
            medians: dict[str, float] = {}
            for side in task.sides:
                values = [
                    float(str(record[figure]))
                    for record in found
                    if (record["script"], record["work"], record["side"]) == (task.script, task.work, side)
                ]
                if not values:
                    continue
                medians[side] = statistics.median(values)
                ratio = medians["sslcli"] / medians[side] if "sslcli" in medians else float("nan")
                told = 1 / ratio if figure in LOWER_IS_BETTER else ratio
                ahead = "" if side == "sslcli" else f"{told:.2f}x"
                spread = f"{min(values):.4g} to {max(values):.4g}"
                yield f"| {task.work} | {figure} | {side} | {medians[side]:.4g} | {spread} | {ahead} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
