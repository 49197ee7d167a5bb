"""Does a run of several processes do what a run of fewer does? `python scripts/equivalence.py [NAME ...]`

Trains every case in 1, 2 and 4 processes with the loop's own step, in float64 and float32, and prints the table of
docs/reliability.md: the largest relative differences of 2 processes from 1 and of 4 from 2.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra._internal.utils import get_args_parser
from torch import Tensor

from gloo import together
from sslcli.cli.compose import checked_jobs
from sslcli.config.settings import TrainSettings
from sslcli.distributed import collectives
from sslcli.engine.loop import Run, optimize, parallel
from sslcli.methods.base import Batch
from sslcli.report.console import Screen
from sslcli.runs import assemble
from sslcli.runs.build import build_optimizer, build_parts

METHODS = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "method").glob("*.yaml"))
STEPS = 4
BATCH = 16  # images a step
OVERRIDES = [
    "dataset=shapes",
    "dataset.train_images=64",
    "dataset.test_images=0",
    "dataset.val_fraction=0",
    "device=cpu",
    f"train.batch_size={BATCH}",
    "train.precision=fp32",
    f"train.max_steps={STEPS}",
    "train.save_every_epochs=0",
    "monitor.knn_every=0",
    "monitor.pictures=0",
]
# Of the keys a method or backbone has. Groups of 4 images are what one of 4 processes has.
SMALLER = {"queue_size": 40, "hidden": 32, "dim": 16, "width": 4, "units": 32, "map_hidden": 32, "bn_group": 4}
FLOOR = 1e-3  # of a tensor's largest value: one that is zero but for rounding differs by nothing worth telling


@dataclass(frozen=True)
class Case:
    """A method with other settings than its yaml's."""

    name: str
    words: tuple[str, ...]  # of the command line
    reason: str = ""  # why several processes cannot do what one does, where they cannot
    rounding: str = ""  # why float32 differs by more than its last digits, where it does


TWO_EPOCHS = "dataset.train_images=32"  # of a memory bank, whose first epoch fills it and trains nothing
NORM = "BatchNorm of one process in float32 (1)"
ADAM = "Adam in float32 (2)"
LOCAL_NORM = "BatchNorm sees the images of one process, here 4 to 16"
VARIANTS = [
    Case("moco, groups of 32", ("method=moco", "method.bn_group=32"), reason=LOCAL_NORM),
    Case("moco, symmetric", ("method=moco", "method.symmetric=true")),
    Case("moco_v2, no BatchNorm", ("method=moco_v2", "backbone=small_layernorm", "method.bn_group=32")),
    Case(
        "moco_v2, Un-Mix",
        ("method=moco_v2", "mixture=unmix"),
        reason="an image is mixed with one of its own process",
    ),
    Case("moco_v3, no BatchNorm", ("method=moco_v3", "backbone=small_layernorm")),
    Case("simclr, no BatchNorm", ("method=simclr", "backbone=small_layernorm", "method.norm=false")),
    Case("simclr, two micro-batches", ("method=simclr", "train.accumulate=2")),
    Case("simclr, clipped", ("method=simclr", "train.clip_grad=0.1")),
    Case("simclr, LARS", ("method=simclr", "optimizer=lars")),
    Case("simclr_v2, memory", ("method=simclr_v2", "method.queue_size=40"), rounding=NORM),
    Case("simclr_v2, memory, two micro-batches", ("method=simclr_v2", "method.queue_size=40", "train.accumulate=2")),
    Case("byol, two micro-batches", ("method=byol", "train.accumulate=2")),
    Case("memory_bank, nce", ("method=memory_bank", "method.loss=nce", "method.negatives=20", TWO_EPOCHS)),
    Case("memory_bank, softmax", ("method=memory_bank", "method.loss=softmax", "method.negatives=20", TWO_EPOCHS)),
    Case("memory_bank, proximal", ("method=memory_bank", "method.proximal=30", TWO_EPOCHS)),
    Case("cmc, nce", ("method=cmc", "method.loss=nce", "method.negatives=20")),
    Case("cmc, softmax", ("method=cmc", "method.loss=softmax", "method.negatives=20")),
    Case("cpc, gru, 4 directions", ("method=cpc", "method.context=gru", "method.directions=4")),
    Case("deep_infomax, JSD", ("method=deep_infomax", "method.measure=JSD", "method.alpha=0.5"), rounding=ADAM),
    Case("deep_infomax, DV", ("method=deep_infomax", "method.measure=DV", "method.alpha=0.5"), rounding=ADAM),
    Case("deep_infomax, concat", ("method=deep_infomax", "method.score=concat", "method.measure=JSD")),
    Case(
        "deep_infomax, own negatives",
        ("method=deep_infomax", "method.gather_negatives=false"),
        reason="negatives are those of one process, as asked",
    ),
    Case("infomin, no jigsaw", ("method=infomin", "method.jigsaw_weight=0", "views=infomin")),
    Case("autoencoder, denoising", ("method=autoencoder", "method.corruption=gaussian"), rounding=NORM),
    Case("vae, free bits", ("method=vae", "method.free_bits=0.1", "method.kl_warmup=0")),
    Case("vae, bernoulli", ("method=vae", "method.reconstruction=bernoulli")),
    Case("bigan, hinge, R1", ("method=bigan", "method.loss=hinge", "method.unary=true", "method.r1=1"), rounding=ADAM),
    Case("dcgan, R1", ("method=dcgan", "method.r1=1"), rounding=NORM),
]
ROUNDING = {"dcgan": NORM, "deep_infomax": ADAM}  # of what the yaml files say
MORE = {"memory_bank": (TWO_EPOCHS,)}
CASES = [
    *(Case(word, (f"method={word}", *MORE.get(word, ())), rounding=ROUNDING.get(word, "")) for word in METHODS),
    *VARIANTS,
]


def composed(case: Case) -> dict[str, Any]:
    """The configuration of the case, small enough for moments; what the case itself sets stays."""
    told = {word.partition("=")[0] for word in case.words}
    words = [word for word in OVERRIDES if word.partition("=")[0] not in told]
    config = checked_jobs("train", get_args_parser().parse_args([*words, *case.words]))[0]
    for group in ("method", "backbone"):
        for key, value in SMALLER.items():
            if config[group].get(key) and f"{group}.{key}" not in told:
                config[group][key] = value
    return config


@dataclass
class Trace:
    """What training did, by step; scalars and gradients are those of all processes together."""

    scalars: list[dict[str, Tensor]]
    gradients: list[dict[str, Tensor]]
    state: dict[str, Any]


def job_of(config: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> Run:
    """The run of a configuration in this process, as the command would make it, without a directory."""
    parts = build_parts(config, trust=[])
    assemble.place(parts.method.train().to(dtype), TrainSettings(**config["train"]), torch.device("cpu"))
    loader = assemble.build_loader(config, parts, torch.device("cpu"))
    optimizer, peak_lr = build_optimizer(config, parts.method)
    screen = Screen(None, silent=True)
    return assemble.assemble(config, parts, loader, optimizer, peak_lr, Path(), torch.device("cpu"), screen)


def train(config: dict[str, Any], dtype: torch.dtype) -> Trace:
    """`STEPS` steps at the peak rate by the training loop's own `optimize`, on this process's part of every batch."""
    job = job_of(config, dtype=dtype)
    job.stop.close()
    trace = Trace([], [], {})

    def look(*_: Any) -> None:
        named = job.method.named_parameters()
        gradients = {n: collectives.whole(p.grad).clone() for n, p in named if p.grad is not None}
        trace.gradients.append(gradients)

    job.optimizer.register_step_pre_hook(look)
    model = parallel(job.method, job.device)
    for step, micro_batches in enumerate(job.loader.steps(0, STEPS)):
        found = optimize(job, model, [in_dtype(batch, dtype) for batch in micro_batches])
        trace.scalars.append({name: collectives.all_reduce_mean(value) for name, value in found.items()})
        job.method.after_step(step / STEPS)
    trace.state = {name: collectives.whole(value.detach()) for name, value in job.method.state_dict().items()}
    return trace


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    return Batch([view.to(dtype) for view in batch.views], batch.index, batch.label, batch.present)


@dataclass(frozen=True)
class Difference:
    """The largest differences between two traces, as shares of the largest value they are compared with."""

    loss: float  # of any step
    gradient: float  # of the first step that has one, over all parameters
    state: float  # after the last step: weights, statistics, queue, bank, each tensor by itself
    whole: list[str]  # names of the integers that differ: counters, heads of queues, draws

    @property
    def largest(self) -> float:
        return max(self.loss, self.gradient, self.state)


def compare(found: Trace, expected: Trace) -> Difference:
    """How far `found` is from `expected`."""
    losses = [(a["loss"], b["loss"]) for a, b in zip(found.scalars, expected.scalars, strict=True)]
    first, same = next(
        pair for pair in zip(found.gradients, expected.gradients, strict=True) if any(g.any() for g in pair[1].values())
    )
    assert first.keys() == same.keys()
    assert found.state.keys() == expected.state.keys()
    scale = max(float(gradient.abs().max()) for gradient in same.values())
    pairs = [(n, found.state[n], expected.state[n]) for n in expected.state if isinstance(expected.state[n], Tensor)]
    return Difference(
        loss=max(share(a, b) for a, b in losses),
        gradient=max(float((first[n] - same[n]).abs().max()) for n in same) / scale,
        state=max(share(a, b) for _, a, b in pairs if b.is_floating_point() and b.numel()),
        whole=[n for n, a, b in pairs if not b.is_floating_point() and not torch.equal(a, b)],
    )


def share(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest value expected, or of `FLOOR` if that is more."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(FLOOR))


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what two states do not have in common bit for bit."""
    return [n for n in one if isinstance(one[n], Tensor) and not torch.equal(one[n], other[n])]


def traces(configs: list[dict[str, Any]], dtype: torch.dtype) -> list[tuple[Trace, list[str]]]:
    """`train` on each, and what of the state the processes disagree about, which should be nothing."""
    found = []
    for config in configs:
        trace = train(config, dtype)
        everyone = collectives.gather_objects(trace.state)
        found.append((trace, sorted({name for other in everyone for name in differing(everyone[0], other)})))
    return found


def rows(cases: list[Case]) -> list[str]:
    """A row of the table for each case."""
    configs = [composed(case) for case in cases]
    found = {
        (size, dtype): together(size, traces, configs, dtype)[0]
        for dtype in (torch.float64, torch.float32)
        for size in (1, 2, 4)
    }
    lines = []
    for place, case in enumerate(cases):
        cells = []
        for dtype in (torch.float64, torch.float32):
            one, two, four = (found[size, dtype][place] for size in (1, 2, 4))
            for more, fewer in ((two, one), (four, two)):
                difference = compare(more[0], fewer[0])
                told = [brief(value) for value in (difference.loss, difference.gradient, difference.state)]
                wrong = [*difference.whole, *more[1]]
                cells.append(", ".join(told) + (f" ({', '.join(wrong)})" if wrong else ""))
        lines.append(f"| {case.name} | " + " | ".join(cells) + f" | {case.reason or case.rounding} |")
    return lines


def brief(value: float) -> str:
    """One digit: 2e-7."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "") if value else "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases; all where none is named")
    names = parser.parse_args().names
    print("| case | float64, 2 against 1 | 4 against 2 | float32, 2 against 1 | 4 against 2 | reason |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows([case for case in CASES if not names or case.name in names])))


if __name__ == "__main__":
    main()
