"""What each method sends in a step: `python scripts/count_communication.py [--json FILE] [NAME ...]`

Runs the training loop's own step with every collective of torch.distributed counted, as one of 2 processes of N and of
2 N images, finds out how the bytes depend on N, checks that as one of 1,024 processes and in 2 and 4 real processes
joined by gloo, and prints the table of docs/scaling.md. What is not real is torch's fake group, whose collectives do
nothing: right for counting, as no count depends on values. Shapes: N images a process, W processes.
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
from gloo import together
from sslcli.cli.compose import checked_jobs
from sslcli.distributed import collectives
from sslcli.engine.loop import optimize, parallel

PACKAGE = str(Path(sslcli.__file__).parent)
# What a collective is for, by the innermost function (file, name) on the way to it that tells.
PURPOSES = {
    ("train", "average_each"): "gradients",
    ("cached_gradients", "average_gradients"): "gradients",
    ("nn", "forward"): "BatchNorm",
    ("nn", "backward"): "BatchNorm, gradient",
    ("nn", "average_statistics"): "running statistics",
    ("distributed", "exchange"): "shuffle",
    ("distributed", "forward"): "embeddings",
    ("distributed", "backward"): "embeddings, gradient",
    ("stopping", "agreed"): "stop flag",
    ("bank", "remember"): "bank rows",
    ("bank", "log_normalizer"): "normalizer, in the first steps",
    ("moco", "forward"): "keys",
    ("simclr_v2", "compare"): "keys",
    ("moco_v3", "contrast"): "keys",
    ("vae", "over_processes"): "means",
    ("vae", "forward"): "figures",
    ("gan", "distance"): "figures",
}


@dataclass
class Counted:
    """What one process puts into the collectives for one purpose."""

    collective: str
    calls: int = 0
    sent: int = 0  # bytes it contributes: a sum its tensor, a gather its part, a scattered sum its part of the result


@dataclass
class Count:
    """Counts the collectives of torch.distributed that sslcli calls while it is open, by purpose."""

    found: dict[str, Counted] = field(default_factory=dict)
    before: list[tuple[Any, str, Any]] = field(default_factory=list)

    def __enter__(self) -> Count:
        size = collectives.world_size()
        self.replace(dist, "all_reduce", "all-reduce", lambda tensor, *_, **__: bytes_of(tensor))
        self.replace(collectives, "_gather", "all-gather", lambda _, mine: bytes_of(mine))
        self.replace(collectives, "_reduce_scatter", "reduce-scatter", lambda mine, _: bytes_of(mine))
        self.replace(dist, "all_to_all_single", "all-to-all", lambda _, mine, *__: bytes_of(mine))
        self.replace(dist, "all_gather_object", "objects", lambda _, mine: len(pickle.dumps(mine)))
        self.replace(dist, "broadcast_object_list", "objects", lambda mine, **_: len(pickle.dumps(mine)) // size)
        self.replace(dist, "barrier", "barrier", lambda *_: 0)
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, original in self.before:
            setattr(module, name, original)
        self.before.clear()

    def replace(self, module: Any, name: str, collective: str, size: Callable[..., int]) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **keywords: Any) -> Any:
            purpose = purpose_of(sys._getframe(1))
            if self.found.setdefault(purpose, Counted(collective)).collective != collective:
                purpose = f"{purpose}, {collective}"
            entry = self.found.setdefault(purpose, Counted(collective))
            entry.calls += 1
            entry.sent += size(*args, **{key: value for key, value in keywords.items() if key != "async_op"})
            return original(*args, **keywords)

        self.before.append((module, name, original))
        setattr(module, name, counted)


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def purpose_of(frame: FrameType | None) -> str:
    """What the caller's collective is for; the name of the calling function where PURPOSES has none."""
    names = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if str(path).startswith(PACKAGE):
            names.append((path.stem, frame.f_code.co_name))
            if names[-1] in PURPOSES:
                return PURPOSES[names[-1]]
        frame = frame.f_back
    return next((name for _, name in names if name not in ("all_gather", "all_reduce_mean")), "elsewhere")


def composed(words: tuple[str, ...], batch_size: int) -> dict[str, Any]:
    """The configuration of a run with these words, the sizes of networks as they say, of `batch_size` images a step."""
    always = [
        "dataset=shapes",
        f"dataset.train_images={batch_size}",
        "dataset.test_images=0",
        "dataset.val_fraction=0",
        "device=cpu",
        "train.precision=fp32",
        "train.max_steps=2",
        "monitor.knn_every=0",
        "monitor.pictures=0",
    ]
    parser = get_args_parser()
    return checked_jobs("train", parser.parse_args([*words, *always, f"train.batch_size={batch_size}"]))[0]


def counted_step(config: dict[str, Any]) -> tuple[int, dict[str, Counted]]:
    """Trainable parameters, and what the second step of a run sends; the first may send what is sent once."""
    job = job_of(config)
    model = parallel(job.method, job.device)
    counts = []
    for step, micro_batches in enumerate(job.loader.steps(0, 2)):
        with Count() as count:
            optimize(job, model, micro_batches)
            job.method.after_step(step / 2)
            job.stop.agreed()
        counts.append(count)
    job.stop.close()
    parameters = sum(p.numel() for p in job.method.parameters() if p.requires_grad)
    return parameters, counts[-1].found


def counted_steps(configs: list[dict[str, Any]]) -> list[tuple[int, dict[str, Counted]]]:
    return [counted_step(config) for config in configs]


@dataclass(frozen=True)
class Traffic:
    """What one process puts into the collectives for one purpose in a step: fixed + an_image * N bytes, for any W."""

    collective: str
    calls: int
    fixed: int
    an_image: int

    def sent(self, num_images: int) -> int:
        """Bytes contributed by a process of `num_images`."""
        return self.fixed + self.an_image * num_images

    def through_the_link(self, num_images: int, processes: int) -> float:
        """Bytes each process sends, and receives, by ring algorithms, which are the least possible."""
        others, mine = processes - 1, self.sent(num_images)
        share = {"all-reduce": 2 * others / processes, "all-to-all": others / processes, "barrier": 0}
        return mine * share.get(self.collective, others)


def traffic_of(few: dict[str, Counted], many: dict[str, Counted], num_images: int) -> dict[str, Traffic]:
    """The law behind what processes of N and of 2 N images send."""
    assert few.keys() == many.keys()
    found = {}
    for purpose, one in few.items():
        other = many[purpose]
        assert (one.calls, one.collective) == (other.calls, other.collective), purpose
        slope, rest = divmod(other.sent - one.sent, num_images)
        assert rest == 0 and slope >= 0, f"{purpose}: {one.sent} and {other.sent} bytes do not lie on a line"  # noqa: PT018
        found[purpose] = Traffic(one.collective, one.calls, one.sent - slope * num_images, slope)
    return found


def check(traffic: dict[str, Traffic], counted: dict[str, Counted], num_images: int, what: str) -> None:
    """Raise ValueError unless the law gives what was counted elsewhere."""
    expected = {name: (t.collective, t.calls, t.sent(num_images)) for name, t in traffic.items()}
    found = {name: (c.collective, c.calls, c.sent) for name, c in counted.items()}
    if expected != found:
        raise ValueError(f"{what}: expected {expected}, counted {found}")


@dataclass(frozen=True)
class Counting:
    """A configuration and what it sends."""

    name: str
    parameters: int
    traffic: dict[str, Traffic]


def pretended(size: int, configs: list[dict[str, Any]]) -> list[tuple[int, dict[str, Counted]]]:
    """`counted_steps` as process 0 of `size`, of which there is no other."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        return counted_steps(configs)
    finally:
        dist.destroy_process_group()


def measure(
    cases: dict[str, tuple[str, ...]], *, num_images: int, pretend: list[int], real: list[int]
) -> list[Counting]:
    """Count each case, by the words of its command line; check on other numbers of processes, pretended and real."""

    def of(images: int) -> list[dict[str, Any]]:
        return [composed(words, images) for words in cases.values()]

    few, many = (pretended(2, of(2 * n)) for n in (num_images, 2 * num_images))
    found = [
        Counting(name, parameters, traffic_of(one, other, num_images))
        for name, (parameters, one), (_, other) in zip(cases, few, many, strict=True)
    ]
    for size in (*pretend, *real):
        configs = of(size * num_images)
        counted = together(size, counted_steps, configs)[0] if size in real else pretended(size, configs)
        for counting, (_, seen) in zip(found, counted, strict=True):
            check(counting.traffic, seen, num_images, f"{counting.name} on {size} processes")
        print(
            f"{len(found)} cases hold on {size:,} {'real' if size in real else 'pretended'} processes", file=sys.stderr
        )
    return found


def table(found: list[Counting]) -> str:
    """One row a purpose, with the first of each case naming it."""
    lines = ["| case | for | collective | calls a step | bytes of a process |", "|---|---|---|---|---|"]
    for counting in found:
        name = f"{counting.name}, {counting.parameters:,} parameters"
        for purpose, traffic in counting.traffic.items():
            law = " + ".join(
                [f"{traffic.fixed:,}"] * (traffic.fixed > 0 or traffic.an_image == 0)
                + [f"{traffic.an_image:,} N"] * (traffic.an_image > 0)
            )
            lines.append(f"| {name} | {purpose} | {traffic.collective} | {traffic.calls} | {law} |")
            name = ""
    return "\n".join(lines)


def as_json(found: list[Counting]) -> str:
    return json.dumps(
        {c.name: {"parameters": c.parameters, "traffic": {p: vars(t) for p, t in c.traffic.items()}} for c in found},
        indent=1,
    )


RESNET = ("backbone=resnet50", "backbone.stem=imagenet", "dataset.image_size=64")
VIT = ("backbone=vit_base", "backbone.patch_size=16", "dataset.image_size=64")
SMALL = {word: (f"method={word}",) for word in METHODS} | {
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
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases; all where none is named")
    parser.add_argument("--pretend", type=int, nargs="*", default=[1024], help="numbers of processes to check on")
    parser.add_argument("--real", type=int, nargs="*", default=[2, 4], help="the same, of real processes")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    wanted = arguments.names
    small = {name: words for name, words in SMALL.items() if not wanted or name in wanted}
    large = {name: words for name, words in LARGE.items() if not wanted or name in wanted}
    torch.set_num_threads(1)
    found = [
        *(measure(small, num_images=4, pretend=arguments.pretend, real=arguments.real) if small else []),
        *(measure(large, num_images=2, pretend=[], real=[]) if large else []),
    ]
    print(table(found))
    if arguments.json:
        arguments.json.write_text(as_json(found) + "\n")


if __name__ == "__main__":
    main()
