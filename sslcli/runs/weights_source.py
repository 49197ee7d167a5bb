"""Sources of weights that a command line can name: a weight file, a run, or pretrained weights of timm."""

from __future__ import annotations

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
class Normalization:
    """Keys of the preprocessing file of an exported folder that state how images are normalized, per channel."""

    mean: list[float]
    std: list[float]


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
        exported: content of a file of ssl-export with current names, else {}.
    """

    where: str
    content: dict[str, Any]
    prefix: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
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
        raise ConfigError(f"{path} is a folder, not a file of weights{source_inside(path)}")
    content = read_published(path)
    provenance = {"weights": str(path.absolute()), "checkpoint_sha256": checkpoint.sha256(path)}
    if not content.keys() >= Export.__required_keys__:  # other weight files lack some of these keys
        return _folder_source(path, content, provenance)
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
        exported=exported,
    )


def source_inside(folder: Path) -> str:
    """Return the end of an error message: which source to name instead of the folder, if it contains one."""
    if (folder / "config.yaml").is_file():
        return f": write {RUN}{folder} for the newest checkpoint of the run"
    files = [folder / target.weights_file for target in TARGETS.values()]
    return next((f": write {path}" for path in files if path.is_file() and path.suffix != ".onnx"), "")


def _folder_source(path: Path, content: dict[str, Any], provenance: dict[str, Any]) -> WeightsSource:
    """Return the source of a weight file, with the normalization that ssl-export wrote beside it, if it did."""
    beside, mean, std = path.with_name(PREPROCESSING), None, None
    if path.name in {target.weights_file for target in TARGETS.values()} and beside.is_file():
        stated = read_json(beside, Normalization, remedy="export the run again, or remove the file")
        mean, std = stated.mean, stated.std
    return WeightsSource(str(path), content, provenance=provenance, mean=mean, std=std)


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
