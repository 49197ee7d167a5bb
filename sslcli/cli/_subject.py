"""What ssl-eval measures: the net of a run or of a bare file, as trained and as initialised, and the images for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslcli import checkpoint, precision
from sslcli.cli import _run_dir
from sslcli.cli._build import build_backbone, build_method, build_source, build_views, check_classes, made_fast
from sslcli.data.sources import Source
from sslcli.data.views import Views
from sslcli.errors import ConfigError

# What a file of ssl-export tells beside the weights, see _export.py.
EXPORTED = {"state_dict", "what", "backbone", "image_size", "mean", "std", "views", "precision", "provenance"}


@dataclass(frozen=True)
class Subject:
    """What is measured: a net, what it was made from, and how images are prepared for it."""

    trained: Callable[[], nn.Module]  # the loaded net
    fresh: Callable[[], nn.Module]  # the same net as initialised
    views: Views  # of pre-training, whose colour space and normalisation hold here too
    mean: Sequence[float]  # of the set of pre-training
    std: Sequence[float]
    precision: str
    provenance: dict[str, Any]
    home: Path  # where results go
    monitor: dict[str, Any]  # the run's monitor.* values, {} for a bare backbone
    foreign: bool  # measured on other images than it was trained on

    def prepare(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the net was trained to see them."""
        return self.views.finish(images, mean=self.mean, std=self.std)

    def net(self, name: str) -> nn.Module:
        """The net `trained` or as initialised, `random`."""
        return self.trained() if name == "trained" else self.fresh()


def load_subject(config: dict[str, Any], device: torch.device) -> tuple[Subject, Source]:
    """The net to measure and the images to measure it on."""
    trust = config["trust"]
    if config["weights"] is not None:
        return _bare(config, device)
    run_dir = Path(config["run"])
    saved = _run_dir.read_config(run_dir)
    check_classes(saved, ("views", "method", "backbone"), trust=trust)
    source = build_source(config if config.get("dataset") else saved, trust=trust)
    views = build_views(saved["views"], trust=trust)
    path = find_checkpoint(run_dir, config["checkpoint"])
    mean, std = saved["dataset"]["mean"], saved["dataset"]["std"]

    def method() -> nn.Module:
        return build_method(
            saved,
            image_size=saved["dataset"]["image_size"],
            num_images=saved["effective"]["training images"],
            trust=trust,
        ).to(device)

    def trained() -> nn.Module:
        net = method()
        load_strictly(net, checkpoint.load(path, device=device, weights=True)["method"], str(path))
        return net

    wanted = config["precision"] if config["precision"] != "auto" else saved["effective"]["precision"]
    provenance = origin(saved, run_dir, path)
    resolved = precision.resolve(wanted, device)
    foreign = bool(config.get("dataset")) and images_of(config["dataset"]) != images_of(saved["dataset"])
    if not foreign:
        provenance["pretrained_on"] = source.name
    home = run_dir / "eval"
    return Subject(trained, method, views, mean, std, resolved, provenance, home, saved["monitor"], foreign), source


def origin(saved: dict[str, Any], run_dir: Path, path: Path) -> dict[str, Any]:
    """Where the weights in a checkpoint come from."""
    return {
        "run": str(run_dir.absolute()),
        "checkpoint": path.name,
        "checkpoint_sha256": checkpoint.digest(path),
        "step": checkpoint.step_of(path),
        "method": saved["method"]["_target_"],
        "backbone": saved["backbone"]["_target_"],
        "pretrained_on": type_name(saved["dataset"]),
        "pretraining_seed": saved["seed"],
    }


def find_checkpoint(run_dir: Path, which: str | int) -> Path:
    """The checkpoint of a run after step `which`, or the "last". Raises ConfigError, naming what there is."""
    paths = checkpoint.all_of(run_dir)
    found = [path for path in paths if which in ("last", checkpoint.step_of(path))]
    if not found:
        kept = ", ".join(str(checkpoint.step_of(path)) for path in paths) or "none"
        raise ConfigError(f"checkpoint is {which!r}, but {run_dir} holds the steps: {kept}")
    return found[-1]


def images_of(node: dict[str, Any]) -> dict[str, Any]:
    """What decides which images a set has, and not how they are read."""
    how = ("workers", "max_bad", "scaled_decode", "keep_decoded", "keep_gb", "keep_dir", "download", "memory_gb")
    return {key: value for key, value in node.items() if key not in how}


def type_name(node: dict[str, Any]) -> str:
    """The name of an image set without building it: what torchvision calls it, or its class."""
    return str(node.get("name") or node["_target_"].rpartition(".")[2].lower())


def _bare(config: dict[str, Any], device: torch.device) -> tuple[Subject, Source]:
    """A backbone from a file of its own; one that ssl-export wrote tells how it was made and sees images."""
    path, trust = Path(config["weights"]), config["trust"]
    found = checkpoint.load_weights(path, device=device)
    exported = found.keys() >= EXPORTED
    made = found if exported else {}
    if made.get("what", "backbone") != "backbone":
        raise ConfigError(f"weights is {path}, but that holds a whole method: export the backbone, with what=backbone")
    node = config.get("backbone") or made.get("backbone")
    if not node:
        raise ConfigError("weights=FILE needs backbone=... as well, unless ssl-export wrote the file")
    if not config.get("dataset"):
        raise ConfigError("weights=FILE needs dataset=... as well")
    source = build_source(config, trust=trust)

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        image_size = made.get("image_size", source.image_size)
        net = build_backbone({"backbone": node}, image_size=image_size, trust=trust).to(device)
        return made_fast(net)

    def trained() -> nn.Module:
        net = fresh()
        load_strictly(net, found["state_dict"] if exported else found, str(path))
        return net

    provenance = {
        "weights": str(path.absolute()),
        "checkpoint_sha256": checkpoint.sha256(path),
        "backbone": node["_target_"],
    }
    if exported:
        provenance["exported_from"] = made["provenance"]
    views = build_views(made["views"], trust=trust) if exported else Views([{"crop_scale": None}])
    wanted = made["precision"] if exported and config["precision"] == "auto" else config["precision"]
    mean, std = made.get("mean", source.mean), made.get("std", source.std)
    subject = Subject(
        trained=trained,
        fresh=fresh,
        views=views,
        mean=mean,
        std=std,
        precision=precision.resolve(wanted, device),
        provenance=provenance,
        home=path.with_name(path.name + ".eval"),
        monitor=made.get("monitor", {}),
        foreign=False,
    )
    return subject, source


def load_strictly(net: nn.Module, state: dict[str, Any], where: str) -> None:
    """Load a state whose keys and shapes all match. Raises ConfigError, naming what does not, otherwise."""
    own = net.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if isinstance(own[key], Tensor) and own[key].shape != state[key].shape
    ]
    if missing or unknown or shapes:
        raise ConfigError(
            f"{where} does not fit this net, and a net with other weights would be measured in its place: "
            f"{len(missing)} keys are missing ({', '.join(missing[:3]) or '-'}), "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3]) or '-'}), "
            f"{len(shapes)} differ in shape ({'; '.join(sorted(shapes)[:3]) or '-'}). Give the backbone it belongs to"
        )
    net.load_state_dict(state)
