"""Counts of the collectives in a step: `python scripts/count_communication.py [--json FILE] [NAME ...]`

The script runs a step of the training loop as one of 2 processes, with N and with 2 N images per process, and counts
every collective of torch.distributed. From these counts it derives a formula for the bytes with any number of
processes W. It verifies the formula as one of 1,024 processes and in 2 and 4 real processes connected by gloo, and
prints the table of docs/scaling.md. The other processes are simulated by torch's fake process group, whose collectives
do nothing; the counts do not depend on the values of tensors.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from hydra._internal.utils import get_args_parser
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import sslcli
from equivalence import METHODS, job_of
from gloo import run_processes
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.distributed import collectives
from sslcli.engine.loop import optimize, parallel

PACKAGE = Path(sslcli.__file__).parent
# The purpose of a collective is that of the innermost function (module, name) of the call stack in this table.
PURPOSES = {
    ("engine.loop", "average_each"): "gradients",
    ("engine.gradient_cache", "average_gradients"): "gradients",
    ("nn.batch_norm", "forward"): "BatchNorm",
    ("nn.batch_norm", "backward"): "BatchNorm, gradient",
    ("nn.batch_norm", "average_statistics"): "running statistics",
    ("distributed.collectives", "exchange"): "shuffle",
    ("distributed.collectives", "forward"): "embeddings",
    ("distributed.collectives", "backward"): "embeddings, gradient",
    ("engine.stop", "agreed"): "stop flag",
    ("methods.bank", "remember"): "bank rows",
    ("methods.bank", "log_normalizer"): "normalizer, in the first steps",
    ("methods.moco", "forward"): "keys",
    ("methods.simclr_v2", "compare"): "keys",
    ("methods.moco_v3", "contrast"): "keys",
    ("methods.vae", "over_processes"): "means",
    ("methods.vae", "forward"): "metrics",
    ("methods.gan", "distance"): "metrics",
    ("methods.bigan", "reconstruction_errors"): "metrics",
}


@dataclass
class CollectiveCount:
    """Number of calls and input bytes of one process's collectives with one purpose."""

    collective: str
    calls: int = 0
    sent: int = 0  # bytes; all-reduce: the tensor, all-gather: the local part, reduce-scatter: the part of the result


@dataclass
class CollectiveCounter:
    """Context manager that counts the collectives of torch.distributed called by sslcli, by purpose."""

    counts: dict[str, CollectiveCount] = field(default_factory=dict)
    originals: list[tuple[Any, str, Any]] = field(default_factory=list)

    def __enter__(self) -> CollectiveCounter:
        size = collectives.world_size()
        self.replace(dist, "all_reduce", "all-reduce", lambda tensor, *_, **__: bytes_of(tensor))
        self.replace(collectives, "_gather", "all-gather", lambda _, local: bytes_of(local))
        self.replace(collectives, "_reduce_scatter", "reduce-scatter", lambda local, _: bytes_of(local))
        self.replace(dist, "all_to_all_single", "all-to-all", lambda _, local, *__: bytes_of(local))
        self.replace(dist, "all_gather_object", "objects", lambda _, local: len(pickle.dumps(local)))
        self.replace(dist, "broadcast_object_list", "objects", lambda local, **_: len(pickle.dumps(local)) // size)
        self.replace(dist, "barrier", "barrier", lambda *_: 0)
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, original in self.originals:
            setattr(module, name, original)
        self.originals.clear()

    def replace(self, module: Any, name: str, collective: str, size: Callable[..., int]) -> None:
        """Replace a function of a module by a wrapper that counts calls; `size` returns the bytes of a call."""
        original = getattr(module, name)

        def counting(*args: Any, **keywords: Any) -> Any:
            purpose = purpose_of(sys._getframe(1))
            if self.counts.setdefault(purpose, CollectiveCount(collective)).collective != collective:
                purpose = f"{purpose}, {collective}"
            entry = self.counts.setdefault(purpose, CollectiveCount(collective))
            entry.calls += 1
            entry.sent += size(*args, **{key: value for key, value in keywords.items() if key != "async_op"})
            return original(*args, **keywords)

        self.originals.append((module, name, original))
        setattr(module, name, counting)


def bytes_of(tensor: Tensor) -> int:
    """Return the size of the data of a tensor in bytes."""
    return tensor.numel() * tensor.element_size()


def purpose_of(frame: FrameType | None) -> str:
    """Return the purpose of the collective that `frame` calls; without one, the name of the calling function."""
    names = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            names.append((module, frame.f_code.co_name))
            if names[-1] in PURPOSES:
                return PURPOSES[names[-1]]
        frame = frame.f_back
    return next((name for _, name in names if name not in ("all_gather", "all_reduce_mean")), "unknown")


def compose_config(overrides: tuple[str, ...], batch_size: int) -> RunConfig:
    """Return the configuration of a CPU run with these overrides and `batch_size` images per step."""
    fixed = [
        "dataset=shapes",
        f"dataset.train_images={batch_size}",
        "dataset.test_images=0",
        "dataset.val_fraction=0",
        "device=cpu",
        "train.precision=fp32",
        "train.max_steps=2",
        "monitor.knn_every_epochs=0",
        "monitor.pictures=0",
    ]
    parser = get_args_parser()
    job = checked_jobs("train", parser.parse_args([*overrides, *fixed, f"train.batch_size={batch_size}"]))[0]
    return RunConfig.from_plain(job)


def count_step(config: RunConfig) -> tuple[int, dict[str, CollectiveCount]]:
    """Return the number of trainable parameters, and the counts of the second step of a run.

    The first step may contain collectives that occur only once.
    """
    job = job_of(config)
    model = parallel(job.method, job.device)
    counters = []
    for step, micro_batches in enumerate(job.loader.steps(0, 2)):
        with CollectiveCounter() as counter:
            job.method.before_step(step / 2, 0.0)
            optimize(job, model, micro_batches)
            job.method.after_step(step / 2)
            job.stop.agreed()
        counters.append(counter)
    job.stop.close()
    parameters = sum(p.numel() for p in job.method.parameters() if p.requires_grad)
    return parameters, counters[-1].counts


def count_steps(configs: list[RunConfig]) -> list[tuple[int, dict[str, CollectiveCount]]]:
    """Return the result of `count_step` for each configuration."""
    return [count_step(config) for config in configs]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one process with one purpose in a step: fixed + per_image * N input bytes for any W."""

    collective: str
    calls: int
    fixed: int
    per_image: int

    def sent(self, num_images: int) -> int:
        """Return the input bytes of a process with `num_images` images."""
        return self.fixed + self.per_image * num_images

    def link_bytes(self, num_images: int, processes: int) -> float:
        """Return the bytes that each process sends (and receives) with ring algorithms, the minimum."""
        others, local = processes - 1, self.sent(num_images)
        factor = {"all-reduce": 2 * others / processes, "all-to-all": others / processes, "barrier": 0}
        return local * factor.get(self.collective, others)


def fit_traffic(
    few: dict[str, CollectiveCount], many: dict[str, CollectiveCount], num_images: int
) -> dict[str, Traffic]:
    """Return the formula of each purpose from the counts of N = `num_images` and of 2 N images per process."""
    assert few.keys() == many.keys()
    traffic = {}
    for purpose, one in few.items():
        other = many[purpose]
        assert (one.calls, one.collective) == (other.calls, other.collective), purpose
        slope, rest = divmod(other.sent - one.sent, num_images)
        assert rest == 0 and slope >= 0, f"{purpose}: {one.sent} and {other.sent} bytes are not linear in N"  # noqa: PT018
        traffic[purpose] = Traffic(one.collective, one.calls, one.sent - slope * num_images, slope)
    return traffic


def check(traffic: dict[str, Traffic], counts: dict[str, CollectiveCount], num_images: int, case: str) -> None:
    """Raise ValueError if the counts of processes with `num_images` images differ from the formulas."""
    expected = {name: (t.collective, t.calls, t.sent(num_images)) for name, t in traffic.items()}
    actual = {name: (c.collective, c.calls, c.sent) for name, c in counts.items()}
    if expected != actual:
        raise ValueError(f"{case}: expected {expected}, counted {actual}")


@dataclass(frozen=True)
class CaseTraffic:
    """Number of parameters and communication of one case."""

    name: str
    parameters: int
    traffic: dict[str, Traffic]


def count_simulated(size: int, configs: list[RunConfig]) -> list[tuple[int, dict[str, CollectiveCount]]]:
    """Return the result of `count_steps` as process 0 of `size`; the other processes are simulated."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        return count_steps(configs)
    finally:
        dist.destroy_process_group()


def measure(
    cases: dict[str, tuple[str, ...]], *, num_images: int, simulated: list[int], real: list[int]
) -> list[CaseTraffic]:
    """Derive the formulas of all cases, and verify them on other numbers of processes, simulated and real.

    Args:
        cases: name and overrides of each case.
        num_images: N, images per process; the formulas are derived from N and 2 N.
        simulated: numbers of processes for which the formulas are verified in this process, with simulated others.
        real: numbers of processes for which they are verified in real processes, connected by gloo.
    """

    def configs_of(batch_size: int) -> list[RunConfig]:
        return [compose_config(overrides, batch_size) for overrides in cases.values()]

    few, many = (count_simulated(2, configs_of(2 * n)) for n in (num_images, 2 * num_images))
    found = [
        CaseTraffic(name, parameters, fit_traffic(one, other, num_images))
        for name, (parameters, one), (_, other) in zip(cases, few, many, strict=True)
    ]
    for size in (*simulated, *real):
        configs = configs_of(size * num_images)
        results = run_processes(size, count_steps, configs)[0] if size in real else count_simulated(size, configs)
        for case, (_, counts) in zip(found, results, strict=True):
            check(case.traffic, counts, num_images, f"{case.name} on {size} processes")
        kind = "real" if size in real else "simulated"
        print(f"The formulas of {len(found)} cases are verified on {size:,} {kind} processes.", file=sys.stderr)
    return found


def table(cases: list[CaseTraffic]) -> str:
    """Return a Markdown table with one row per purpose; the first row of each case has its name."""
    lines = ["| case | for | collective | calls per step | bytes per process |", "|---|---|---|---|---|"]
    for case in cases:
        name = f"{case.name}, {case.parameters:,} parameters"
        for purpose, traffic in case.traffic.items():
            formula = " + ".join(
                [f"{traffic.fixed:,}"] * (traffic.fixed > 0 or traffic.per_image == 0)
                + [f"{traffic.per_image:,} N"] * (traffic.per_image > 0)
            )
            lines.append(f"| {name} | {purpose} | {traffic.collective} | {traffic.calls} | {formula} |")
            name = ""
    return "\n".join(lines)


def as_json(cases: list[CaseTraffic]) -> str:
    """Return the formulas of all cases as JSON, the input of `step_time.py` and `replay_communication.py`."""
    return json.dumps(
        {c.name: {"parameters": c.parameters, "traffic": {p: vars(t) for p, t in c.traffic.items()}} for c in cases},
        indent=1,
    )


RESNET = ("backbone=resnet50", "backbone.stem=imagenet", "dataset.image_size=64")
VIT = ("backbone=vit_base", "backbone.patch_size=16", "dataset.image_size=64")
SMALL = {method: (f"method={method}",) for method in METHODS} | {
    "simclr_v2, memory": ("method=simclr_v2", "method.queue_size=4096"),
    "memory_bank, nce": ("method=memory_bank", "method.loss=nce", "method.negatives=64"),
    "cmc, nce": ("method=cmc", "method.loss=nce", "method.negatives=64"),
    "deep_infomax, global": ("method=deep_infomax", "method.alpha=1", "method.beta=0"),
}
LARGE = {
    "resnet50, simclr": ("method=simclr", *RESNET),
    "resnet50, byol": ("method=byol", *RESNET),
    "resnet50, moco_v2": ("method=moco_v2", *RESNET),
    "resnet50, moco_v3": ("method=moco_v3", *RESNET),
    "resnet50, memory_bank": ("method=memory_bank", "method.loss=nce", "method.negatives=64", *RESNET),
    "vit_base, moco_v3": ("method=moco_v3", "method.projector_layers=3", "method.predictor_norm=true", *VIT),
    "vit_base, simclr": ("method=simclr", *VIT),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases to count (default: all)")
    parser.add_argument(
        "--pretend", type=int, nargs="*", default=[1024], help="verify on these numbers of simulated processes"
    )
    parser.add_argument("--real", type=int, nargs="*", default=[2, 4], help="verify on these numbers of real processes")
    parser.add_argument("--json", type=Path, help="also write the formulas to this file")
    arguments = parser.parse_args()
    names = arguments.names
    small = {name: overrides for name, overrides in SMALL.items() if not names or name in names}
    large = {name: overrides for name, overrides in LARGE.items() if not names or name in names}
    torch.set_num_threads(1)
    cases = [
        *(measure(small, num_images=4, simulated=arguments.pretend, real=arguments.real) if small else []),
        *(measure(large, num_images=2, simulated=[], real=[]) if large else []),
    ]
    print(table(cases))
    if arguments.json:
        arguments.json.write_text(as_json(cases) + "\n")


if __name__ == "__main__":
    main()
