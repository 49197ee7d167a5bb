"""Parts of a step in the GPU benchmark: LARS, synchronized BatchNorm, color operations; and an epoch with k-NN."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_sides import build_run, peer_backbone, random_source
from gpu_timing import Plan, measure_steps
from measure import Result, command
from torch import Tensor
from workload import Workload

LAYERS = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]  # (channels, side) of feature maps of ResNet-50


def lars(side: str, work: Workload, plan: Plan) -> Result:
    """Measure one update of the parameters of the backbone by LARS."""
    net = peer_backbone(work)[0].to(plan.device)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    if side == "lightly":
        from lightly.utils.lars import LARS as optimizer_class
    else:
        from sslcli.engine.optim import LARS as optimizer_class  # type: ignore[assignment]
    optimizer = optimizer_class(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-6)
    return measure_steps(optimizer.step, plan, images=None)


def sync_batch_norm(side: str, plan: Plan) -> Result:
    """Measure forward and backward passes of synchronized BatchNorm in a group of one process, without its messages."""
    backend = "cpu:gloo,cuda:nccl" if plan.on_gpu else "gloo"
    count, layers = (64, LAYERS) if plan.on_gpu else (2, LAYERS[-1:])
    maps = [
        torch.randn(count, channels, size, size, device=plan.device).to(memory_format=torch.channels_last)
        for channels, size in layers
    ]
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            return measure_steps(normalization(side, maps, plan), plan, images=None)
        finally:
            dist.destroy_process_group()


def normalization(side: str, maps: list[Tensor], plan: Plan) -> Callable[[], None]:
    """Return a function that normalizes feature maps in training mode and computes all gradients."""
    from torch.nn.modules._functions import SyncBatchNorm as TorchSync

    from sslcli.nn.batch_norm import _FusedSyncNormalize, _SyncNormalize

    layers = []
    for values in maps:
        weight, bias = (torch.ones(values.size(1), device=plan.device, requires_grad=True) for _ in range(2))
        mean, variance = (torch.ones(values.size(1), device=plan.device) for _ in range(2))
        layers.append((values.requires_grad_(), weight, bias, mean, variance))

    def step() -> None:
        for values, weight, bias, mean, variance in layers:
            if side == "torch":
                out = TorchSync.apply(values, weight, bias, mean, variance, 1e-5, 0.1, dist.group.WORLD, 1)
            elif plan.on_gpu:
                out = _FusedSyncNormalize.apply(values, weight, bias, mean, variance, 0.1, 1e-5)
            else:
                out = _SyncNormalize.apply(values, weight, bias, 1e-5)[0]
            out.backward(values.detach())
            values.grad = None

    return step


def color(work: Workload, plan: Plan) -> Result:
    """Measure the color operations of SimCLR's two views on crops that are on the device."""
    run = build_run("simclr", work._replace(backbone="small"), plan, source=random_source(work, work.batch))
    loader = run.loader
    request = next(loader.requests(0, 1))
    (numbers,) = loader.views.groups
    crops = torch.rand(len(numbers) * work.batch, 3, work.size, work.size, device=plan.device)
    return measure_steps(lambda: loader.color(request, crops, numbers), plan, images=work.batch)


def epoch(work: Workload, plan: Plan) -> Result:
    """Measure the epochs of `ssl-train` after the first one, each with a k-NN evaluation of a tenth of the images."""
    images, epochs = (10_000, 4) if plan.on_gpu else (64, 2)
    line = [
        "method=simclr",
        f"backbone={work.backbone}",
        f"train.batch_size={work.batch}",
        f"device={plan.device.type}",
    ]
    line += [f"dataset.train_images={images}", "dataset.test_images=0", f"train.epochs={epochs}", "monitor.knn_k=10"]
    with tempfile.TemporaryDirectory() as run_dir:
        line += [f"dataset.image_size={work.size}", f"run_dir={run_dir}"]
        subprocess.run([command("ssl-train"), *line], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(text) for text in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    walls = [line["wall"] for line in lines if "monitor/knn_top1" in line]
    seconds = statistics.median(after - before for before, after in itertools.pairwise(walls))
    return {"images_per_s": images / seconds, "ms": 1e3 * seconds, "steps": len(walls) - 1}
