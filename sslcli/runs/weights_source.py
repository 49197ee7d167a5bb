"""Sources of weights that a command line can name: a weight file, a run, or pretrained weights of timm."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from sslcli.config.moved import current_config
from sslcli.config.paths import SOURCES_OF_WEIGHTS
from sslcli.engine import checkpoint
from sslcli.errors import ConfigError
from sslcli.methods.base import Method
from sslcli.runs import directory
from sslcli.runs.build import build_views, check_classes, find_class
from sslcli.runs.checkpoint_of_run import load_checkpoint, provenance_of
from sslcli.system.stored import DamagedFile, checked, read_json
from sslcli.weights.export.formats import TARGETS
from sslcli.weights.export.preprocessing import PREPROCESSING
from sslcli.weights.files import broken_part
from sslcli.weights.published_files import read_published
from sslcli.weights.timm_weights import timm_weights

RUN, TIMM = SOURCES_OF_WEIGHTS
NETWORK_GROUPS = ("views", "method", "backbone")  # config groups from which a network and its input are built


class ExportOptions(TypedDict, total=False):
    """Optional keys of a file that ssl-export wrote. The files of older versions lack some of these keys."""

    monitor: dict[str, Any]
    dataset: dict[str, Any]
    method: dict[str, Any]
    image_fingerprint: str | None
    evaluated_part: str


class Export(ExportOptions):
    """Required keys of a file that ssl-export wrote."""

    state_dict: dict[str, Any]
    what: str
    backbone: dict[str, Any]
    image_size: int
    mean: list[float]
    std: list[float]
    views: dict[str, Any]
    precision: str
    provenance: dict[str, Any]


@dataclass(frozen=True)
class StatedImages:
    """Keys of a preprocessing file beside a weight file: the normalization of images per channel, and their size."""

    mean: list[float]
    std: list[float]
    center_crop: int | None = None  # image size in pixels


def check_export(path: Path, content: dict[str, Any]) -> None:
    """Raise DamagedFile if a file of ssl-export has a wrong checksum, lacks a key, or has a value of the wrong type.

    `content` is the content of the file `path`.
    """
    remedy = "export it again with ssl-export"
    broken = broken_part(path)
    if broken:
        raise DamagedFile(path, f"the checksum of {broken} is wrong", remedy)
    checked(content, Export, path, remedy=remedy)


@dataclass(frozen=True)
class WeightsSource:
    """Weights as they are stored, and what their source states about them.

    Attributes:
        where: name of the source, for messages.
        content: tensors in nested dictionaries.
        prefix: prefix of the network to evaluate, if the source states it. None means that it must be searched.
        provenance: entries for a result file, as JSON values.
        backbone: settings of the backbone, if the source states them. `image_size` is then that of pre-training.
        mean, std: normalization of the images, per channel, if the source states it.
        image_size: side of the images of pre-training in pixels, if the source states it.
        exported: content of a file of ssl-export with current names, else {}.
    """

    where: str
    content: dict[str, Any]
    prefix: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    image_size: int | None = None
    exported: dict[str, Any] = field(default_factory=dict)


def open_weights(spec: str, *, trust: list[str]) -> WeightsSource:
    """Read weights from a source, to the CPU.

    `spec` is one of:
        FILE: a file of ssl-export, torch.save or safetensors.
        run:DIR: the newest checkpoint of a run directory.
        timm:NAME: pretrained weights of a timm model, from timm's cache or the network.

    `trust` is described in `find_class`. Raises ConfigError if the source cannot be read.
    """
    if spec.startswith(RUN):
        return _run_source(Path(spec.removeprefix(RUN)), trust)
    if spec.startswith(TIMM):
        return _timm_source(spec.removeprefix(TIMM))
    return _file_source(Path(spec))


def _file_source(path: Path) -> WeightsSource:
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder, not a file of weights{source_inside(path) or ': name the file of weights'}"
        )
    content = read_published(path)
    provenance = {"weights": str(path.absolute()), "checkpoint_sha256": checkpoint.sha256(path)}
    if not content.keys() >= Export.__required_keys__:  # other weight files lack some of these keys
        return _plain_source(path, content, provenance)
    check_export(path, content)
    exported = current_config(content)[0]
    part = exported.get("evaluated_part", Method.evaluated_part) if exported["what"] == "method" else ""
    return WeightsSource(
        str(path),
        exported["state_dict"],
        prefix=part,
        provenance=provenance,
        backbone=exported["backbone"],
        mean=exported["mean"],
        std=exported["std"],
        image_size=exported["image_size"],
        exported=exported,
    )


def run_or_weights(path: str | os.PathLike[str]) -> tuple[str, bool]:
    """Return the path of a run or weight file, or timm:NAME, and True if it is a run.

    Raises ConfigError if there is no such run or file.
    """
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(name, str):
        raise ConfigError(f"the run or weight file is {name!r}, but it must be a text or a pathlib.Path")
    if name.startswith(TIMM):
        return name, False
    name = os.path.expanduser(name.removeprefix(RUN))
    if not os.path.exists(name):
        raise ConfigError(f"there is no run directory or weight file {name!r} in {os.getcwd()}: correct the path")
    is_folder = os.path.isdir(name)
    if is_folder and not os.path.exists(os.path.join(name, "config.yaml")):
        remedy = source_inside(Path(name)) or " (it has no config.yaml): name a run directory or a file of weights"
        raise ConfigError(f"{name} is a folder, but not a run directory{remedy}")
    return name, is_folder


def source_inside(folder: Path) -> str:
    """Return the end of an error message: which source to name instead of the folder, if it contains one."""
    if (folder / "config.yaml").is_file():
        return f": write {RUN}{folder} for the newest checkpoint of the run"
    files = [folder / target.weights_file for target in TARGETS.values()]
    return next((f": write {path}" for path in files if path.is_file() and path.suffix != ".onnx"), "")


def _plain_source(path: Path, content: dict[str, Any], provenance: dict[str, Any]) -> WeightsSource:
    """Return the source of a weight file that is not of `ssl-export format=torch`."""
    stated = stated_images(path)
    if stated is None:
        return WeightsSource(str(path), content, provenance=provenance)
    return WeightsSource(
        str(path),
        content,
        provenance=provenance,
        mean=stated.mean,
        std=stated.std,
        image_size=stated.center_crop,
    )


def stated_images(path: Path) -> StatedImages | None:
    """Return what the preprocessing file beside the weight file `path` states about its images, or None without one.

    This file is FILE.preprocessing.json or, for a file with the name of an exported folder's weights,
    preprocessing.json. Raises ConfigError if it is damaged, or if its values are impossible.
    """
    names = [f"{path.name}.{PREPROCESSING}"]
    if path.name in {target.weights_file for target in TARGETS.values()}:  # it does not describe other files
        names.append(PREPROCESSING)
    beside = next((found for found in map(path.with_name, names) if os.path.isfile(found)), None)
    if beside is None:
        return None
    remedy = "correct it, export the run again, or remove the file"
    stated = read_json(beside, StatedImages, remedy=remedy)
    wrong = wrong_statistics(stated.mean, stated.std)
    if wrong:
        raise DamagedFile(beside, wrong, remedy)
    if stated.center_crop is not None and stated.center_crop < 1:
        raise DamagedFile(beside, f"center_crop is {stated.center_crop}, but it must be at least 1", remedy)
    return stated


def wrong_statistics(mean: Sequence[float], std: Sequence[float]) -> str:
    """Return why `mean` and `std` cannot normalize images, or "" if they can."""
    if not mean or len(mean) != len(std):
        return f"mean has {len(mean)} and std has {len(std)} values, but both need one for each channel"
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        return f"mean is {list(mean)} and std is {list(std)}, but they must be finite, and std greater than 0"
    return ""


def numbers(name: str, values: Any) -> list[float] | None:
    """Return the argument `name`, a sequence, an array or None, as a list. Raises ConfigError for other values."""
    if values is None:
        return None
    try:
        if isinstance(values, str):
            raise TypeError
        found = [float(value) for value in values]
        if not found:
            raise ValueError
        return found
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} is {values!r}, but it must be a list with one number for each channel, such as [0.5, 0.5, 0.5]"
        ) from error


def _run_source(run_dir: Path, trust: list[str]) -> WeightsSource:
    saved = directory.read_trained_config(run_dir)
    check_classes({group: saved.get(group) for group in NETWORK_GROUPS}, trust=trust)
    directory.check_input(run_dir, saved)
    loaded = load_checkpoint(run_dir, "last", saved)
    method = find_class(saved["method"]["_target_"], base=Method, trust=trust, where="method._target_")
    views = build_views(saved["views"], trust=trust)
    mean, std = views.statistics(mean=saved["dataset"]["mean"], std=saved["dataset"]["std"])
    return WeightsSource(
        f"{RUN}{run_dir} (step {loaded.step})",
        loaded.weights,
        prefix=method.evaluated_part,
        provenance=provenance_of(saved, run_dir, loaded),
        backbone=saved["backbone"],
        mean=mean,
        std=std,
    )


def _timm_source(name: str) -> WeightsSource:
    found = timm_weights(name)
    node = {"_target_": "sslcli.backbones.timm.Timm", "name": name, "pretrained": False}
    return WeightsSource(
        f"{TIMM}{name}",
        found.state,
        provenance={"weights": f"{TIMM}{name}", "timm": found.version, "checkpoint_sha256": found.digest},
        backbone=node,
        mean=found.mean,
        std=found.std,
    )
