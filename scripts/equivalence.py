"""Comparison of training in 1, 2 and 4 processes: `python scripts/equivalence.py [NAME ...]`

The script trains every case with the step of the training loop, in float64 and float32. It prints the table of
docs/reliability.md, which has the largest relative differences between runs with 1 and 2 processes, and with 2 and 4.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra._internal.utils import get_args_parser
from torch import Tensor

from gloo import run_processes
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.distributed import collectives
from sslcli.engine.loop import optimize, parallel
from sslcli.engine.run import Run
from sslcli.methods.base import Batch
from sslcli.report.console import Screen
from sslcli.runs import assemble
from sslcli.runs.build import build_optimizer
from sslcli.runs.parts import build_parts

# distill needs a teacher, and mixes only images of the same process
METHODS = sorted({path.stem for path in (Path(__file__).parents[1] / "conf/method").glob("*.yaml")} - {"distill"})
STEPS = 4
BATCH = 16  # images per step
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
    "monitor.knn_every_epochs=0",
    "monitor.pictures=0",
]
# Values for those keys that a method or backbone has. With 4 processes, each has 4 images, hence groups of 4.
SMALLER = {
    **{"queue_size": 40, "hidden": 32, "dim": 16, "width": 4, "units": 32, "map_hidden": 32, "bn_group": 4},
    **{"depth": 2, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
}
FLOOR = 1e-3  # minimum of a tensor's largest value, for tensors that are zero except for rounding


@dataclass(frozen=True)
class Case:
    """A method with overrides."""

    name: str
    overrides: tuple[str, ...]
    reason: str = ""  # reason, if several processes do not compute the same as one process
    rounding: str = ""  # reason, if float32 results differ by more than rounding


TWO_EPOCHS = "dataset.train_images=32"  # if the first epoch fills a memory bank without training
NORM = "BatchNorm of one process in float32 (1)"
ADAM = "Adam in float32 (2)"
LOCAL_NORM = "BatchNorm statistics come from one process, here 4 to 16 images"
VARIANTS = [
    Case("moco, groups of 32", ("method=moco", "method.bn_group=32"), reason=LOCAL_NORM),
    Case("moco, symmetric", ("method=moco", "method.symmetric=true")),
    Case("moco_v2, no BatchNorm", ("method=moco_v2", "backbone=small_layernorm", "method.bn_group=32")),
    Case(
        "moco_v2, Un-Mix",
        ("method=moco_v2", "mixture=unmix"),
        reason="each image is mixed with an image of the same process",
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
        reason="negatives come from one process, as configured",
    ),
    Case("infomin, no jigsaw", ("method=infomin", "method.jigsaw_weight=0", "views=infomin")),
    Case("autoencoder, denoising", ("method=autoencoder", "method.corruption=gaussian"), rounding=NORM),
    Case("vae, free bits", ("method=vae", "method.free_bits=0.1", "method.kl_warmup=0")),
    Case("vae, bernoulli", ("method=vae", "method.reconstruction=bernoulli")),
    Case("bigan, hinge, R1", ("method=bigan", "method.loss=hinge", "method.unary=true", "method.r1=1"), rounding=ADAM),
    Case("dcgan, R1", ("method=dcgan", "method.r1=1"), rounding=NORM),
]
ROUNDING = {  # cases of the methods with their default settings
    **dict.fromkeys(("bigan", "dcgan"), NORM),
    **dict.fromkeys(("deep_infomax", "dino", "dinov2", "ibot", "lejepa", "mae"), ADAM),
}
MORE_OVERRIDES = {
    "deepcluster_v2": (TWO_EPOCHS, "method.num_prototypes=[4,4,5]"),
    "memory_bank": (TWO_EPOCHS,),
}
CASES = [
    *(
        Case(method, (f"method={method}", *MORE_OVERRIDES.get(method, ())), rounding=ROUNDING.get(method, ""))
        for method in METHODS
    ),
    *VARIANTS,
]


def compose_config(case: Case) -> RunConfig:
    """Return the configuration of a case with small networks, except for values that the case sets."""
    keys = {override.partition("=")[0] for override in case.overrides}
    overrides = [override for override in OVERRIDES if override.partition("=")[0] not in keys]
    config = checked_jobs("train", get_args_parser().parse_args([*overrides, *case.overrides]))[0]
    for group in ("method", "backbone"):
        for key, value in SMALLER.items():
            if config[group].get(key) and f"{group}.{key}" not in keys:
                config[group][key] = value
    return RunConfig.from_plain(config)


@dataclass
class Trace:
    """Scalars and gradients of each step, averaged over the processes, and the final state of the method."""

    scalars: list[dict[str, Tensor]]
    gradients: list[dict[str, Tensor]]
    state: dict[str, Any]


def job_of(config: RunConfig, *, dtype: torch.dtype = torch.float32) -> Run:
    """Build the run of a configuration in this process as `ssl-train` does, without a run directory."""
    parts = build_parts(config)
    assemble.move_to_device(parts.method.train().to(dtype), config.train, torch.device("cpu"))
    loader = assemble.build_loader(config, parts, torch.device("cpu"))
    optimizer, peak_lr = build_optimizer(config, parts.method)
    screen = Screen(None, silent=True)
    return assemble.assemble(config, parts, loader, optimizer, peak_lr, Path(), torch.device("cpu"), screen)


def train(config: RunConfig, dtype: torch.dtype) -> Trace:
    """Train `STEPS` steps at the peak learning rate with the `optimize` of the training loop."""
    job = job_of(config, dtype=dtype)
    job.stop.close()
    trace = Trace([], [], {})

    def record_gradients(*_: Any) -> None:
        named = job.method.named_parameters()
        gradients = {n: collectives.whole(p.grad).clone() for n, p in named if p.grad is not None}
        trace.gradients.append(gradients)

    job.optimizer.register_step_pre_hook(record_gradients)
    model = parallel(job.method, job.device)
    for step, micro_batches in enumerate(job.loader.steps(0, STEPS)):
        job.method.before_step(step / STEPS, step / job.loader.steps_per_epoch)
        scalars = optimize(job, model, [in_dtype(batch, dtype) for batch in micro_batches])
        trace.scalars.append({name: collectives.all_reduce_mean(value) for name, value in scalars.items()})
        job.method.after_step(step / STEPS)
    trace.state = {name: collectives.whole(value.detach()) for name, value in job.method.state_dict().items()}
    return trace


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return a batch with its views in `dtype`."""
    return Batch([view.to(dtype) for view in batch.views], batch.index, batch.label, batch.present)


@dataclass(frozen=True)
class Difference:
    """Largest differences between two traces, relative to the largest expected value."""

    loss: float  # over all steps
    gradient: float  # of the first step with a nonzero gradient, over all parameters
    state: float  # weights, statistics, queue, bank after the last step; relative to each tensor's largest value
    integers: list[str]  # names of integer tensors that differ: counters, positions in queues, random draws

    @property
    def largest(self) -> float:
        """The largest of the relative differences."""
        return max(self.loss, self.gradient, self.state)


def compare(actual: Trace, expected: Trace) -> Difference:
    """Return the differences of `actual` from `expected`."""
    # A cosine loss may be close to 0 in single steps, so the differences are relative to the largest loss.
    losses, expected_losses = (torch.stack([step["loss"] for step in trace.scalars]) for trace in (actual, expected))
    gradients, reference = next(
        pair
        for pair in zip(actual.gradients, expected.gradients, strict=True)
        if any(g.any() for g in pair[1].values())
    )
    assert gradients.keys() == reference.keys()
    assert actual.state.keys() == expected.state.keys()
    scale = max(float(gradient.abs().max()) for gradient in reference.values())
    pairs = [(n, actual.state[n], expected.state[n]) for n in expected.state if isinstance(expected.state[n], Tensor)]
    return Difference(
        loss=relative_difference(losses, expected_losses),
        gradient=max(float((gradients[n] - reference[n]).abs().max()) for n in reference) / scale,
        state=max(relative_difference(a, b) for _, a, b in pairs if b.is_floating_point() and b.numel()),
        integers=[n for n, a, b in pairs if not b.is_floating_point() and not torch.equal(a, b)],
    )


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference divided by the largest expected value, which is at least FLOOR."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(FLOOR))


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the tensors of two states that are not bit-identical."""
    return [n for n in one if isinstance(one[n], Tensor) and not torch.equal(one[n], other[n])]


def traces(configs: list[dict[str, Any]], dtype: torch.dtype) -> list[tuple[Trace, list[str]]]:
    """Train each configuration, and return its trace and the names of tensors that differ between the processes."""
    results = []
    for config in configs:
        trace = train(config, dtype)
        states = collectives.gather_objects(trace.state)
        results.append((trace, sorted({name for state in states for name in differing(states[0], state)})))
    return results


def rows(cases: list[Case]) -> list[str]:
    """Return the rows of the table, one per case."""
    configs = [compose_config(case) for case in cases]
    results = {
        (size, dtype): run_processes(size, traces, configs, dtype)[0]
        for dtype in (torch.float64, torch.float32)
        for size in (1, 2, 4)
    }
    lines = []
    for index, case in enumerate(cases):
        cells = []
        for dtype in (torch.float64, torch.float32):
            one, two, four = (results[size, dtype][index] for size in (1, 2, 4))
            for more, fewer in ((two, one), (four, two)):
                difference = compare(more[0], fewer[0])
                values = [one_digit(value) for value in (difference.loss, difference.gradient, difference.state)]
                wrong = [*difference.integers, *more[1]]
                cells.append(", ".join(values) + (f" ({', '.join(wrong)})" if wrong else ""))
        lines.append(f"| {case.name} | " + " | ".join(cells) + f" | {case.reason or case.rounding} |")
    return lines


def one_digit(value: float) -> str:
    """Return a number with one significant digit, such as 2e-7."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "") if value else "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases to train (default: all)")
    names = parser.parse_args().names
    print("| case | float64, 2 against 1 | 4 against 2 | float32, 2 against 1 | 4 against 2 | reason |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows([case for case in CASES if not names or case.name in names])))


if __name__ == "__main__":
    main()
