"""Execution of ssl-export: write weights and settings of a checkpoint to one file.

The file can be read with torch.load(weights_only=True).

Keys of the file:

state_dict    the weights, named as in `state_dict()` of the backbone or the method. If the backbone wraps a network of
              another package, such as timm, the weights are named as in `state_dict()` of this network
what          "backbone" or "method"
evaluated_part
              the part of the method that is evaluated, such as "backbone". With what=backbone, its weights are exported
backbone      `_target_` and arguments of the backbone
method        `_target_` and arguments of the method
seed, num_images
              further arguments of the method
dataset, image_fingerprint
              the images of pre-training
image_size, mean, std, views, precision, monitor
              preprocessing, precision of forward passes, and k-NN settings.
              mean and std are 0 and 1 if images were not normalized
provenance    run, checkpoint, its digest, step, dataset, seed
sslcli        the version that wrote the file
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslcli import __version__
from sslcli.config.own_dataset import FINGERPRINT, image_settings
from sslcli.config.settings import ExportSettings
from sslcli.engine.checkpoint import Loaded
from sslcli.errors import EXIT_FAILED, ConfigError, TrainingFailed, is_disk_failure, print_error
from sslcli.methods.base import Method
from sslcli.report.console import Screen
from sslcli.runs import directory
from sslcli.runs.build import build_backbone, build_views, find_class
from sslcli.runs.subject import load_checkpoint, provenance_of
from sslcli.system import atomic
from sslcli.weights.files import is_noise_state, load_strictly, unwrapped


def run(config: ExportSettings) -> int:
    """Run ssl-export with a validated configuration, and return the exit code."""
    try:
        export(config)
    except TrainingFailed as error:
        print_error("export", error)
        return EXIT_FAILED
    return 0


def export(config: ExportSettings) -> None:
    """Write the weights of a checkpoint to a file, and print a table. Raises TrainingFailed if the disk is full."""
    run_dir, what = Path(str(config.run)), config.what
    saved = directory.read_trained_config(run_dir)
    directory.check_input(run_dir, saved)
    loaded = load_checkpoint(run_dir, config.checkpoint, saved)
    weights, step = loaded.weights, loaded.step
    out = Path(config.out or run_dir / "export" / f"{what}-step-{step:08d}.pt")
    method = find_class(saved["method"]["_target_"], base=Method, trust=config.trust, where="method._target_")
    if what == "backbone":
        prefix = f"{method.evaluated_part}."
        weights = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix) and not is_noise_state(name)
        }
        weights = unwrapped(check_backbone_alone(method, saved, weights, trust=config.trust), weights)
    content = {"state_dict": weights, "what": what, "evaluated_part": method.evaluated_part}
    write(out, content | description(saved, run_dir, loaded, trust=config.trust))
    broken = [name for name, value in weights.items() if isinstance(value, Tensor) and not value.isfinite().all()]
    numbers = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
    with Screen() as screen:
        screen.table(
            f"exported: {out}",
            {
                "what": what,
                "evaluated part": method.evaluated_part,
                "step": step,
                "parameters": numbers,
                "size (MB)": round(out.stat().st_size / 1e6, 1),
            },
        )
        if broken:
            screen.warn(
                f"{len(broken)} of {len(weights)} tensors are not finite, {broken[0]} among them: the run diverged; "
                "export an earlier checkpoint with checkpoint=STEP"
            )
        size = saved["dataset"]["image_size"]
        screen.say(f"to evaluate it: ssl-eval weights={out} dataset=... dataset.image_size={size}")


def check_backbone_alone(
    method: type[Method], saved: dict[str, Any], weights: dict[str, Any], *, trust: list[str]
) -> nn.Module:
    """Build the backbone of a run, load `weights`, and return it. `saved` is the configuration of the run.

    Raises ConfigError unless the backbone without the rest of the method computes the same features as the method.
    """
    remedy = (
        "so the backbone alone does not give the accuracies of the run: export what=method, which ssl-eval "
        "weights=FILE evaluates as well"
    )
    if method.features is not Method.features:
        raise ConfigError(f"what is 'backbone', but {method.__name__} overrides features, {remedy}")
    backbone = build_backbone(saved["backbone"], image_size=saved["dataset"]["image_size"], trust=trust)
    try:
        load_strictly(backbone, weights, "the checkpoint")
    except ConfigError as error:
        raise ConfigError(
            f"what is 'backbone', but {method.__name__} changes the layers of the backbone, {remedy}"
        ) from error
    return backbone


def description(saved: dict[str, Any], run_dir: Path, loaded: Loaded, *, trust: list[str]) -> dict[str, Any]:
    """Return the entries of an export that describe the training of the weights, as plain values.

    `saved` is the configuration of the run, and `loaded` is the exported checkpoint.
    """
    dataset = saved["dataset"]
    mean, std = build_views(saved["views"], trust=trust).statistics(mean=dataset["mean"], std=dataset["std"])
    return {
        "backbone": saved["backbone"],
        "method": saved["method"],
        "seed": saved["seed"],
        "num_images": saved["effective"]["training images"],
        "dataset": image_settings(dataset),
        "image_fingerprint": saved["effective"].get(FINGERPRINT),
        "image_size": dataset["image_size"],
        "mean": mean,
        "std": std,
        "views": saved["views"],
        "precision": saved["effective"]["precision"],
        "monitor": saved["monitor"],
        "provenance": provenance_of(saved, run_dir, loaded),
        "sslcli": __version__,
    }


def write(out: Path, content: dict[str, Any]) -> None:
    """Write the exported `content` to the file `out`, atomically.

    Raises TrainingFailed if the disk is full or broken, and ConfigError if `out` cannot be written for another reason.
    """

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:  # torch.save(path) would raise errors without an error number
            torch.save(content, file)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(out, fill)
    except OSError as error:
        if is_disk_failure(error):
            raise TrainingFailed(
                f"{error.filename or out} cannot be written ({error.strerror}): free space or repair the disk"
            ) from error
        raise ConfigError(f"out is {out}, but it cannot be written ({error.strerror or error})") from error
