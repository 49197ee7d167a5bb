"""format=torch: one file for sslcli, which can be read with torch.load(weights_only=True).

Keys of the file:

state_dict    the weights, named as in `state_dict()` of the backbone or the method. If the backbone wraps a network of
              another package, such as timm, the weights are named as in `state_dict()` of this network
what          "backbone" or "method"
evaluated_part
              the part of the method that is evaluated, such as "backbone". With what=backbone, its weights are exported
backbone      `_target_` and arguments of the backbone
method        `_target_` and arguments of the method
seed, num_images, teacher_features
              further arguments of the method; teacher_features is None without a teacher
dataset, image_fingerprint
              the images of pre-training
image_size, mean, std, views, precision, monitor
              preprocessing, precision of forward passes, and k-NN settings.
              mean and std are 0 and 1 if images were not normalized
provenance    run, checkpoint, its digest, step, dataset, seed
sslcli        the version that wrote the file
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.methods.base import Method
from sslcli.runs.build import build_backbone, build_method
from sslcli.runs.export_check import Images, check_difference, difference, features_of
from sslcli.runs.exported_run import ExportedRun
from sslcli.system import atomic
from sslcli.weights.export.target import not_finite
from sslcli.weights.files import load_strictly, load_weights, unwrapped, wrapped

USAGE = """\
import torch

exported = torch.load("{name}", weights_only=True)
state, settings = exported["state_dict"], exported["backbone"]
"""


def write_file(run: ExportedRun, what: str, out: Path, images: Images) -> tuple[dict[str, Any], float | None]:
    """Write the backbone or the method of a run to the file `out`, after the file was loaded again.

    Returns the exported weights, and the relative difference between the features of the file and of the run on
    `images`. The difference is None if weights are not finite. Raises ConfigError if the difference is too large.
    """
    description = {"what": what, "evaluated_part": run.method.evaluated_part, **run.facts}
    if what == "method":
        weights = run.loaded.weights
        net = build(description, trust=run.trust)
        load_strictly(net, weights, str(run.loaded.path))
    else:
        weights = run.backbone_weights()
        net = run.backbone(weights)
        weights = unwrapped(net, weights)
    content = {"state_dict": weights, **description}
    found: list[float] = []

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:  # torch.save(path) would raise errors without an error number
            torch.save(content, file)
        if not_finite(weights) is None:
            prepared = run.prepare(images.images)
            again = build_from(load_weights(temporary, device=torch.device("cpu")), temporary, trust=run.trust)
            expected = features_of(encoder(net), prepared)
            found.append(difference(features_of(encoder(again), prepared), expected))
            check_difference(found[0], "torch", images)

    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(out, fill)
    return weights, found[0] if found else None


def encoder(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function that computes features: that of a method, or a backbone itself. `net` is set to eval mode."""
    net.eval()
    return net.features if isinstance(net, Method) else net


def build(content: dict[str, Any], *, trust: list[str]) -> nn.Module:
    """Build the untrained network that the content of an exported file describes."""
    size = content["image_size"]
    if content["what"] == "backbone":
        return build_backbone(content["backbone"], image_size=size, trust=trust)
    return build_method(
        content["method"],
        content["backbone"],
        seed=content["seed"],
        image_size=size,
        num_images=content["num_images"],
        teacher_features=content["teacher_features"],
        trust=trust,
    )


def build_from(content: dict[str, Any], path: Path, *, trust: list[str]) -> nn.Module:
    """Build the network that the content of the file `path` describes, with its weights."""
    net = build(content, trust=trust)
    load_strictly(net, wrapped(net, content["state_dict"]), str(path))
    return net
