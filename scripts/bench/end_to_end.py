"""Benchmark of training from JPEG files: `ssl-train`, and lightly's example loop with its own data loader."""

from __future__ import annotations

from functools import partial
from typing import Any

from measure import Result, run_benchmark, timed, train_throughput
from pictures import file_paths, image_folder
from torch import nn
from torch.utils.data import DataLoader
from training import build_lightly_step
from views import TransformedImages, lightly_transform
from workload import BATCH, METHODS, cifar_resnet18

FILES = ((32, 32), 8192)
STEPS = {"resnet18": 12, "small": 300}
OVERRIDES = {"simclr": [], "moco_v2": [f"method.bn_group={BATCH}"], "byol": []}


def sslcli_training(method: str, backbone: str, precision: str) -> Result:
    """Measure the images per second that `ssl-train` logs."""
    return train_throughput(
        f"experiment=cifar10_{method}",
        f"backbone={backbone}",
        "dataset=folder",
        f"dataset.root={image_folder(*FILES)}",
        "dataset.image_size=32",
        f"train.batch_size={BATCH}",
        f"train.precision={precision}",
        "monitor.health_every_steps=0",
        *OVERRIDES[method],
        steps=STEPS[backbone],
    )


def lightly_training(method: str, backbone: str, *, best: bool) -> Result:
    """Measure lightly's example: a plain loop, and SimCLRTransform without blur in two workers."""
    net, width = small_backbone() if backbone == "small" else (cifar_resnet18(), 512)
    step = build_lightly_step(method, net, width, best=best)
    data = TransformedImages(file_paths(image_folder(*FILES)), lightly_transform(32, blur=0.0))
    batches = iter(DataLoader(data, batch_size=BATCH, num_workers=2, drop_last=True, shuffle=False))

    return timed(lambda: step(next(batches)), images=BATCH, seconds=20.0, warmup=2 if backbone == "resnet18" else 5)


def small_backbone() -> tuple[nn.Module, int]:
    """Return sslcli's small backbone, which both libraries train, and its number of features."""
    from sslcli.backbones.small import Small

    net = Small(image_size=32)
    return net, net.num_features


if __name__ == "__main__":
    benchmarks: dict[str, Any] = {}
    for method in METHODS:
        for backbone in ("resnet18", "small"):
            name = f"{method}_{backbone}"
            benchmarks[f"{name}/sslcli"] = partial(sslcli_training, method, backbone, "auto")
            benchmarks[f"{name}/sslcli fp32"] = partial(sslcli_training, method, backbone, "fp32")
            benchmarks[f"{name}/lightly"] = partial(lightly_training, method, backbone, best=False)
            benchmarks[f"{name}/lightly best"] = partial(lightly_training, method, backbone, best=True)
    run_benchmark(benchmarks)
