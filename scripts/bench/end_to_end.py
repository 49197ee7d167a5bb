"""Training from JPEG files as a user runs it: `ssl-train`, and lightly's example loop with its own loader."""

from __future__ import annotations

from functools import partial
from typing import Any

from measure import Result, answer, timed, trained
from pictures import file_paths, folder
from torch import nn
from torch.utils.data import DataLoader
from training import BATCH, LIGHTLY, cifar_resnet18, lightly_step
from views import InMemory, lightly

FILES = ((32, 32), 8192)
STEPS = {"resnet18": 12, "small": 300}
HEADS = {"simclr": [], "moco_v2": [f"method.bn_group={BATCH}"], "byol": []}


def ours(method: str, backbone: str, precision: str) -> Result:
    """The images a second that the run itself writes down."""
    return trained(
        f"experiment=cifar10_{method}",
        f"backbone={backbone}",
        "dataset=folder",
        f"dataset.root={folder(*FILES)}",
        "dataset.image_size=32",
        f"train.batch_size={BATCH}",
        f"train.precision={precision}",
        "monitor.health_every=0",
        *HEADS[method],
        steps=STEPS[backbone],
    )


def example(method: str, backbone: str, *, best: bool) -> Result:
    """lightly's example: SimCLRTransform without blur in two workers, a bare loop."""
    net, width = small() if backbone == "small" else (cifar_resnet18(), 512)
    step = lightly_step(method, net, width, best=best)
    data = InMemory(file_paths(folder(*FILES)), lightly(32, blur=0.0))
    batches = iter(DataLoader(data, batch_size=BATCH, num_workers=2, drop_last=True, shuffle=False))

    return timed(lambda: step(next(batches)), images=BATCH, seconds=20.0, warmup=2 if backbone == "resnet18" else 5)


def small() -> tuple[nn.Module, int]:
    """The demo's backbone, for both sides."""
    from sslcli.backbones.small import Small

    net = Small(image_size=32)
    return net, net.num_features


if __name__ == "__main__":
    work: dict[str, Any] = {}
    for method in LIGHTLY:
        for backbone in ("resnet18", "small"):
            name = f"{method}_{backbone}"
            work[f"{name}/sslcli"] = partial(ours, method, backbone, "auto")
            work[f"{name}/sslcli fp32"] = partial(ours, method, backbone, "fp32")
            work[f"{name}/lightly"] = partial(example, method, backbone, best=False)
            work[f"{name}/lightly best"] = partial(example, method, backbone, best=True)
    answer(work)
