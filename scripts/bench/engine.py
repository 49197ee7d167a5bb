"""Benchmark of the overhead of `ssl-train`: the same step and views in `ssl-train` and in a bare loop."""

from __future__ import annotations

from functools import partial

import torch
from measure import Result, run_benchmark, timed, train_throughput

BATCH, IMAGES = 128, 4096
STEPS = {"resnet18": 12, "small": 400}
JITTER = [0.4, 0.4, 0.4, 0.1]
VIEW = {"count": 2, "crop_scale": [0.2, 1.0], "flip": 0.5, "jitter": JITTER, "jitter_p": 0.8, "grayscale": 0.2}


def sslcli_training(backbone: str) -> Result:
    """Measure the images per second that `ssl-train` logs."""
    views = ",".join(f"{name}:{value}" for name, value in VIEW.items())
    return train_throughput(
        "method=simclr",
        f"backbone={backbone}",
        f"dataset.limit={IMAGES}",
        "dataset.val_fraction=0",
        f"views.views=[{{{views}}}]",
        f"train.batch_size={BATCH}",
        steps=STEPS[backbone],
    )


def bare_loop(backbone: str) -> Result:
    """Measure a loop of views, forward, backward and optimizer, without logging, checks or checkpoints."""
    from sslcli.backbones.resnet import ResNet
    from sslcli.backbones.small import Small
    from sslcli.data.loader import Loader
    from sslcli.data.sources.base import Shapes
    from sslcli.data.views.views import Views
    from sslcli.engine import precision
    from sslcli.methods.simclr import SimCLR
    from sslcli.runs.build import accelerate
    from sslcli.system.memory import keep_freed_memory

    keep_freed_memory()
    device = torch.device("cpu")
    net = Small(image_size=32) if backbone == "small" else ResNet("resnet18", image_size=32)
    method = accelerate(SimCLR(net)).train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4, fused=True)
    source = Shapes(image_size=32, train_images=IMAGES, test_images=0)
    loader = Loader(source, Views([VIEW]), batch_size=BATCH, accumulate=1, seed=0, device=device)
    steps = loader.steps(0, 10**9)
    resolved = precision.resolve("auto", device)

    def step() -> None:
        (batch,) = next(steps)
        with precision.autocast(device, resolved):
            loss = method(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, images=BATCH, seconds=30.0, warmup=5)


if __name__ == "__main__":
    benchmarks = {}
    for backbone in STEPS:
        benchmarks[f"{backbone}/sslcli"] = partial(sslcli_training, backbone)
        benchmarks[f"{backbone}/bare loop"] = partial(bare_loop, backbone)
    run_benchmark(benchmarks)
