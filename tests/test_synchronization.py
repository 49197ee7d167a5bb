"""No step of a method makes the host wait for the device."""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra._internal.utils import get_args_parser

import sslcli
from method_runs import teacher_overrides
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.data.loader import Loader
from sslcli.engine import health
from sslcli.engine.loop import optimize
from sslcli.engine.run import Run
from sslcli.methods.base import Batch
from sslcli.report.console import Screen
from sslcli.runs.assemble import assemble, build_loader
from sslcli.runs.build import build_optimizer
from sslcli.runs.parts import build_parts
from synchronizations import CUDA, Synchronizations, counted, move_to_device

ROOT = Path(sslcli.__file__).parent
METHODS = sorted(path.stem for path in (ROOT.parent / "conf" / "method").glob("*.yaml"))
# Combinations of settings that run other code than the defaults of the methods.
VARIANTS = [
    "autoencoder method.corruption=gaussian",
    "cmc method.loss=softmax",
    "memory_bank method.loss=nce method.proximal=1",
    "moco optimizer=lars",
    "simclr mixture=unmix",
    "simclr optimizer=adamw train.clip_grad=1",
    "vae optimizer=adam method.kl_warmup=0.5",
]
# Synchronizations by step, for methods that cannot do without. The reasons:
# memory_bank with loss=nce computes the normalizer Z once, from the first batch whose images have a row of the bank.
# Until then, it asks each batch of the first epoch, which has two steps, whether there is such an image.
ALLOWED = {"memory_bank method.loss=nce method.proximal=1": [1, 1, 2, 0]}
STEPS = 4
OVERRIDES = [
    "dataset=shapes",
    "dataset.train_images=16",
    "dataset.test_images=0",
    "dataset.val_fraction=0",
    "dataset.resident=false",
    "device=cpu",
    "launcher.threads=1",
    "train.batch_size=8",
    "train.precision=fp32",
    "train.compile=false",
    "train.max_steps=100",
    "train.log_every_steps=100",
    "monitor.knn_every_epochs=0",
    "monitor.pictures=0",
    "monitor.health_every_steps=0",
]
SMALLER = {
    "queue_size": 40,
    "hidden": 32,
    "dim": 16,
    "width": 4,
    "num_heads": 1,
}  # of the keys a method or backbone has
HOST_READS = {"item", "tolist", "nonzero", "masked_select", "new_tensor", "numpy"}


def config_of(words: str) -> RunConfig:
    method, *overrides = words.split()
    arguments = [f"method={method}", *teacher_overrides(method), *OVERRIDES, *overrides]
    job = checked_jobs("train", get_args_parser().parse_args(arguments))[0]
    for group in ("method", "backbone"):
        job[group] |= {key: value for key, value in SMALLER.items() if job[group].get(key) is not None}
    if isinstance(job["method"].get("num_prototypes"), list):  # of heads that cluster the 16 images
        job["method"]["num_prototypes"] = [4, 5]
    return RunConfig.from_plain(job)


def run_on_device(config: RunConfig, run_dir: Path) -> Run:
    parts = build_parts(config)
    move_to_device(parts.method.train())
    loader = build_loader(config, parts, CUDA)
    optimizer, peak = build_optimizer(config, parts.method)
    run = assemble(config, parts, loader, optimizer, peak, run_dir, CUDA, Screen(silent=True))
    run.monitor.start(0, run.total_steps)
    return run


def batch_on_device(loader: Loader, step: int) -> Batch:
    """The batch of a step, whose views are computed on the device."""
    request = next(loader.requests(step, step + 1))
    position = loader.source.splits["train"][request.index]
    assert loader.source.images is not None
    images = loader.source.images[position].pin_memory().to(CUDA, non_blocking=True)
    crops = [loader.crop(images, loader.key(request), numbers) for numbers in loader.views.groups]
    return loader.batch(request, crops, position)


def take_step(run: Run, step: int) -> None:
    """Compute the views of a batch and train with it, as the training loop does."""
    scalars = optimize(run, run.method, [batch_on_device(run.loader, step)])
    run.method.after_step(run.progress_at(step))
    run.monitor.after_step(step + 1, scalars, lr=0.1, method=run.method)


def synchronizations(words: str, run_dir: Path, counter: Synchronizations) -> list[Counter[str]]:
    """The synchronizations of each step by place, without those for constants that the first step copies."""
    run = run_on_device(config_of(words), run_dir)
    found = []
    try:
        for step in range(STEPS):
            counter.found.clear()
            take_step(run, step)
            found.append(Counter(place for place in counter.found if not (step == 0 and "devices.py" in place)))
    finally:
        run.stop.close()
        run.monitor.close()
    return found


@pytest.mark.parametrize("words", METHODS + VARIANTS)
def test_no_step_waits_for_the_device(words: str, tmp_path: Path) -> None:
    with counted() as counter, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA is not available")  # said by autocast
        found = synchronizations(words, tmp_path, counter)
    assert [step.total() for step in found] == ALLOWED.get(words, [0] * STEPS), found


def test_a_logged_step_copies_the_means_and_the_first_bad_step_once(tmp_path: Path) -> None:
    with counted() as counter, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA is not available")
        run = run_on_device(config_of("simclr train.log_every_steps=2"), tmp_path)
        take_step(run, 0)
        counter.found.clear()
        take_step(run, 1)
        run.stop.close()
        run.monitor.close()
    assert [place.partition(":")[0] for place in counter.found] == ["_to_copy in engine/metric_means.py"] * 2


def test_the_health_metrics_are_copied_together() -> None:
    z = torch.randn(8, 4)
    with counted() as counter:
        on_device = z.pin_memory().to(CUDA, non_blocking=True)
        values = health.measure(on_device, on_device)
    assert Counter(place.partition(" ")[0] for place in counter.found) == {"_linalg_svd": 2, "_to_copy": 1}
    assert values == pytest.approx(health.measure(z, z))


def test_the_counter_finds_what_waits_and_nothing_else() -> None:
    host = torch.arange(4.0)
    with counted() as counter:
        x = host.to(CUDA, non_blocking=True)
        assert (x.device, x.sum().device, torch.zeros(2, device=x.device).device) == (CUDA, CUDA, CUDA)

        def waits(compute: Callable[[], object]) -> int:
            counter.found.clear()
            compute()
            return len(counter.found)

        for compute in (
            lambda: x.sum().item(),
            lambda: float(x[0]),
            lambda: bool(x[0] > 0),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: host.to(CUDA),
            lambda: host.to(CUDA, non_blocking=True),
            lambda: host.pin_memory().to(CUDA),
            lambda: host.to(x),
            lambda: x.copy_(host),
            lambda: host.copy_(x),
            lambda: x.new_tensor(1.0),
            lambda: torch.tensor(1.0, device=CUDA),
            lambda: x[x > 1],
            lambda: x[torch.tensor([0, 1])],
            lambda: x.nonzero(),
            lambda: x.masked_select(x > 1),
            lambda: torch.equal(x, x),
        ):
            assert waits(compute) == 1
        for compute in (
            lambda: x.new_full((), 1.0) + torch.full((), 2.0, device=CUDA),
            lambda: host.pin_memory().to(CUDA, non_blocking=True),
            lambda: x.copy_(host.pin_memory(), non_blocking=True),
            lambda: x[torch.arange(2, device=CUDA)],
            lambda: torch.where(x > 1, x, 0.0) + x.masked_fill(x > 1, 0.0),
            lambda: x.to(torch.float64).sort().values[0] * torch.tensor(2.0),
        ):
            assert waits(compute) == 0
        with pytest.raises(AssertionError, match="got a CPU tensor"):
            x + host


def host_reads(path: Path) -> list[str]:
    """Calls of methods that read a tensor on the host, as "file function call", outside of the state of checkpoints."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        f"{path.relative_to(ROOT)} {function.name} {node.func.attr}"
        for function in functions
        if function.name not in ("set_extra_state", "get_extra_state")
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in HOST_READS
    ]


def test_methods_and_layers_read_no_tensor_on_the_host() -> None:
    """The steps of this file run only some of the branches of the methods."""
    paths = [path for folder in ("methods", "nn") for path in sorted((ROOT / folder).glob("*.py"))]
    found = [call for path in paths for call in host_reads(path)]
    assert found == [
        "nn/masks.py multiblock_masks tolist",  # numbers that are drawn on the CPU
        "nn/masks.py multiblock_masks nonzero",
        "nn/padding.py padding_fraction item",  # for the startup table
    ]
