"""Training steps, loaders and training loops of the GPU benchmark, of sslcli and of other libraries."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from gpu_timing import Plan, measure_steps
from measure import Result
from pictures import file_paths, image_folder
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import build_lightly_step
from views import PHOTO, TransformedImages, lightly_transform
from workload import Workload, cifar_resnet18

if TYPE_CHECKING:
    from sslcli.config.run_config import RunConfig
    from sslcli.data.sources.base import Source
    from sslcli.engine.run import Run

FILES = (PHOTO[0], 2048)  # (width, height), about the size of ImageNet's images, and number of files
TOY_FILES = ((40, 30), 32)
COMPARABLE = {  # the heads and the queue of lightly's examples
    "simclr": ["method.hidden=null"],
    "moco_v2": ["method.queue_size=4096", "method.bn_group=null"],
    "byol": ["method.hidden=1024"],
}


def compose(*overrides: str) -> RunConfig:
    """Return the configuration of `ssl-train` with these overrides."""
    from hydra._internal.utils import get_args_parser

    from sslcli.cli.compose import checked_jobs
    from sslcli.config.run_config import RunConfig

    return RunConfig.from_plain(checked_jobs("train", get_args_parser().parse_args(list(overrides)))[0])


def random_source(work: Workload, count: int) -> Source:
    """Return a dataset of `count` random images in memory."""
    from sslcli.data.sources.base import Source

    source = Source(image_size=work.size)
    source.images = torch.randint(0, 256, (count, 3, work.size, work.size), dtype=torch.uint8)
    source.labels = torch.arange(count) % 10
    source.classes = [str(label) for label in range(10)]
    source.splits = {"train": torch.arange(count), "val": torch.arange(0)}
    return source


def build_run(method: str, work: Workload, plan: Plan, *overrides: str, source: Source | None = None) -> Run:
    """Return the training loop of `ssl-train` for a method and a workload, without k-NN and health metrics.

    `source` replaces the dataset of the configuration.
    """
    from sslcli.distributed import devices
    from sslcli.report.console import Screen
    from sslcli.runs.assemble import assemble, build_loader, move_to_device
    from sslcli.runs.build import build_method, build_optimizer, build_source, build_views
    from sslcli.runs.parts import Parts
    from sslcli.system.memory import keep_freed_memory

    line = [f"method={method}", f"backbone={work.backbone}", f"dataset.image_size={work.size}"]
    line += [f"train.batch_size={work.batch}", f"device={plan.device.type}", *COMPARABLE.get(method, [])]
    config = compose(
        *line, "monitor.knn_every_epochs=0", "monitor.health_every_steps=0", "monitor.pictures=0", *overrides
    )
    device = devices.pick_device(config.device)
    keep_freed_memory()
    devices.prepare(device, deterministic=devices.uses_deterministic_kernels(config.train.deterministic, device))
    source = source or build_source(config.dataset, trust=[])
    images = {"image_size": work.size, "num_images": len(source.splits["train"])}
    parts = Parts(
        source,
        build_views(config.views, trust=[]),
        build_method(config.method, config.backbone, seed=0, trust=[], **images),
    )
    loader = build_loader(config, parts, device)
    move_to_device(parts.method, config.train, device)
    optimizer, peak = build_optimizer(config, parts.method)
    folder = Path(mkdtemp(dir=os.environ.get("BENCH_FOLDER")))  # gpu.py removes this folder
    run = assemble(config, parts, loader, optimizer, peak, folder, device, Screen(silent=True))
    run.method.train()
    return run


def training_step(run: Run, batches: Iterator[Any]) -> Callable[[], None]:
    """Return a step of the training loop of `ssl-train`, without logging and checkpoints."""
    from sslcli.engine.loop import optimize

    def step() -> None:
        optimize(run, run.method, next(batches))
        run.method.after_step(0.5)

    return step


def sslcli_step(method: str, work: Workload, plan: Plan, compiled: bool, deterministic: bool) -> Result:
    """Measure a step on one batch of random views that is on the device."""
    settings = [f"train.compile={compiled}".lower(), f"train.deterministic={deterministic}".lower()]
    run = build_run(method, work, plan, *settings, source=random_source(work, work.batch))
    batches = itertools.repeat(next(run.loader.steps(0, 1)))
    return measure_steps(training_step(run, batches), plan, images=work.batch)


def peer_backbone(work: Workload) -> tuple[nn.Module, int]:
    """Return torchvision's network without the classifier, and its number of features."""
    if work.backbone == "resnet18":
        return cifar_resnet18(), 512
    if work.backbone == "resnet50":
        net = torchvision.models.resnet50()
        net.fc = nn.Identity()
        return net, 2048
    if work.backbone == "vit_small":
        vit = torchvision.models.VisionTransformer(work.size, 16, 12, 6, 384, 1536)
        vit.heads = nn.Identity()
        return vit, 384
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)), 8


def lightly_step(method: str, work: Workload, plan: Plan, best: bool, compiled: bool) -> Result:
    """Measure the step of lightly's example on two random views that are on the device."""
    net, width = peer_backbone(work)
    step = build_lightly_step(method, net, width, best=best, device=plan.device, compiled=compiled)
    views = [torch.rand(work.batch, 3, work.size, work.size, device=plan.device) for _ in range(2)]
    return measure_steps(lambda: step(views), plan, images=work.batch)


def photos(plan: Plan) -> Path:
    """Return a directory of JPEGs, which gpu.py has written."""
    return image_folder(*(FILES if plan.on_gpu else TOY_FILES))


def file_overrides(plan: Plan, workers: int | None) -> list[str]:
    given = [] if workers is None else [f"dataset.workers={workers}"]
    return ["dataset=folder", f"dataset.root={photos(plan)}", "dataset.val_fraction=0", *given]


def sslcli_loader(work: Workload, plan: Plan, workers: int) -> Result:
    """Measure the loader of `ssl-train`, with the views on the device."""
    run = build_run("simclr", work._replace(backbone="small"), plan, *file_overrides(plan, workers))
    batches = run.loader.steps(0, 10**9)
    try:
        return measure_steps(lambda: next(batches), plan, images=work.batch)
    finally:
        batches.close()


def lightly_batches(work: Workload, plan: Plan, workers: int | None = None) -> Iterator[list[Tensor]]:
    """Yield the two views of SimCLRTransform on the device. None: as many workers as cores, except for one core."""
    from sslcli.system.cpu import cores_per_process

    data = TransformedImages(file_paths(photos(plan)), lightly_transform(work.size, blur=0.5))
    workers = max(1, cores_per_process() - 1) if workers is None else workers
    for views in DataLoader(data, batch_size=work.batch, num_workers=workers, drop_last=True, pin_memory=plan.on_gpu):
        yield [view.to(plan.device, non_blocking=True) for view in views]


def lightly_loader(work: Workload, plan: Plan, workers: int) -> Result:
    batches = lightly_batches(work, plan, workers)
    return measure_steps(lambda: next(batches), plan, images=work.batch)


def dali_loader(work: Workload, plan: Plan, workers: int) -> Result:
    from gpu_dali import dali_batches

    batches = dali_batches(photos(plan), work.size, work.batch, workers, plan)
    return measure_steps(lambda: next(batches), plan, images=work.batch)


LOADERS = {"sslcli": sslcli_loader, "lightly": lightly_loader, "dali": dali_loader}


def sslcli_training(work: Workload, plan: Plan, *, files: bool) -> Result:
    """Measure SimCLR's steps of `ssl-train` with its loader, from JPEG files or from images in memory."""
    source = None if files else random_source(work, 4 * work.batch)
    run = build_run("simclr", work, plan, *(file_overrides(plan, None) if files else []), source=source)
    batches = run.loader.steps(0, 10**9)
    try:
        return measure_steps(training_step(run, batches), plan, images=work.batch)
    finally:
        batches.close()


def peer_training(side: str, work: Workload, plan: Plan) -> Result:
    """Measure SimCLR's steps of lightly's example from JPEG files, with its own loader or with DALI's."""
    from gpu_dali import dali_batches

    from sslcli.system.cpu import cores_per_process

    if side == "dali":
        batches = dali_batches(photos(plan), work.size, work.batch, cores_per_process(), plan)
    else:
        batches = lightly_batches(work, plan)
    net, width = peer_backbone(work)
    step = build_lightly_step("simclr", net, width, best=side != "lightly", device=plan.device)
    return measure_steps(lambda: step(next(batches)), plan, images=work.batch)
