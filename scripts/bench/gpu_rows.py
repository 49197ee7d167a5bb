"""Rows of the GPU benchmark: `python gpu_rows.py ROW/SIDE` measures one row with one library, see gpu.py.

Each row has a name, the sides (libraries and settings) that are compared, and a function that measures one side. The
sides are:

- sslcli: the step and the loader of `ssl-train` with its defaults.
- lightly: its documented example with its default settings, in float32.
- lightly best: with what a user can enable: channels-last memory, bf16, a fused optimizer, and in the rows with compile
  torch.compile.
- dali: the step of `lightly best`, with views of DALI that decode only the crops (`decoders.image_slice`).
- torch: the layer of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gpu_parts
import gpu_sides
from gpu_timing import Plan
from measure import Result, run_benchmark
from training import LIGHTLY
from workload import Workload

import sslcli

PACKAGES = {"lightly": "lightly", "lightly best": "lightly", "dali": "nvidia.dali"}  # side -> package that it needs
CONF = Path(sslcli.__file__).parents[1] / "conf"
METHODS = [name for name in ("simclr", "moco_v2", "byol", "dino") if (CONF / "method" / f"{name}.yaml").is_file()]


WORKLOADS = {
    "resnet50_224_b256": Workload("resnet50", 224, 256),
    "vit_small_224_b256": Workload("vit_small", 224, 256),
    "resnet18_32_b256": Workload("resnet18", 32, 256),
    "resnet18_32_b1024": Workload("resnet18", 32, 1024),
}
TOY = Workload("small", 32, 8)  # on the CPU, for every row


class Row(NamedTuple):
    """Sides of a row, and the function that measures a side."""

    sides: tuple[str, ...]
    measure: Callable[[str, Plan], Result]
    needs_files: bool = False


def workload(name: str, plan: Plan) -> Workload:
    return WORKLOADS[name] if plan.on_gpu else TOY


def step_row(method: str, work: str, compiled: bool, deterministic: bool) -> Row:
    """Return the row of a training step on images that are on the device."""
    sides = ["sslcli"]
    if method in LIGHTLY and not deterministic:
        sides += ["lightly best"] if compiled else ["lightly", "lightly best"]

    def measure(side: str, plan: Plan) -> Result:
        if side == "sslcli":
            return gpu_sides.sslcli_step(method, workload(work, plan), plan, compiled, deterministic)
        return gpu_sides.lightly_step(method, workload(work, plan), plan, side == "lightly best", compiled)

    return Row(tuple(sides), measure)


def loader_row(workers: int) -> Row:
    """Return the row of the loader alone, from JPEG files."""

    def measure(side: str, plan: Plan) -> Result:
        return gpu_sides.LOADERS[side](workload("resnet50_224_b256", plan), plan, workers if plan.on_gpu else 1)

    return Row(("sslcli", "lightly", "dali"), measure, needs_files=True)


def training_row(work: str, *, files: bool) -> Row:
    """Return the row of training from JPEG files or from images in memory, including the views."""

    def measure(side: str, plan: Plan) -> Result:
        if side == "sslcli":
            return gpu_sides.sslcli_training(workload(work, plan), plan, files=files)
        return gpu_sides.peer_training(side, workload(work, plan), plan)

    return Row(("sslcli", "lightly", "lightly best", "dali") if files else ("sslcli",), measure, needs_files=files)


STEPS = {
    f"step/{method}/{work}/{'compile' if compiled else 'eager'}{'_deterministic' * deterministic}": step_row(
        method, work, compiled, deterministic
    )
    for method in METHODS
    for work in WORKLOADS
    for compiled in (False, True)
    for deterministic in (False, True)
}
ROWS = STEPS | {
    "loader/8_workers": loader_row(8),
    "loader/15_workers": loader_row(15),
    "training/jpeg": training_row("resnet50_224_b256", files=True),
    "training/memory": training_row("resnet18_32_b256", files=False),
    "lars": Row(
        ("sslcli", "lightly"), lambda side, plan: gpu_parts.lars(side, workload("resnet50_224_b256", plan), plan)
    ),
    "sync_batch_norm": Row(("sslcli", "torch"), gpu_parts.sync_batch_norm),
    "color": Row(("sslcli",), lambda side, plan: gpu_parts.color(workload("resnet50_224_b256", plan), plan)),
    "epoch_with_knn": Row(("sslcli",), lambda side, plan: gpu_parts.epoch(workload("resnet18_32_b256", plan), plan)),
}
SHORT = [  # the rows of `make gpu`
    "step/simclr/resnet18_32_b256/eager",
    "step/simclr/resnet50_224_b256/eager",
    "step/byol/resnet50_224_b256/eager",
    "step/simclr/vit_small_224_b256/eager",
    "training/memory",
    "epoch_with_knn",
]

if __name__ == "__main__":
    plan = Plan.from_environment()
    run_benchmark(
        {f"{name}/{side}": partial(row.measure, side, plan) for name, row in ROWS.items() for side in row.sides}
    )
