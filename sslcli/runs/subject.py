"""What ssl-eval measures: the net of a run or of a bare file, as trained and as initialized, and the images for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.config.moved import current_config
from sslcli.config.own_dataset import FINGERPRINT, dataset_of_run, has_same_keys, has_same_paths, missing_path_hint
from sslcli.config.run_config import EvalConfig
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.engine import checkpoint, precision
from sslcli.errors import ConfigError
from sslcli.runs import directory
from sslcli.runs.build import build_backbone, build_method, build_source, build_views, check_classes, made_fast
from sslcli.weights.files import load_strictly, load_weights

# What a file of ssl-export tells beside the weights, see _export.py.
MEASURED = ("views", "method", "backbone")  # groups that a network and its input are built from
EXPORTED = {"state_dict", "what", "backbone", "image_size", "mean", "std", "views", "precision", "provenance"}


@dataclass(frozen=True)
class Subject:
    """What is measured: a net, what it was made from, and how images are prepared for it."""

    trained: Callable[[], nn.Module]  # the loaded net
    fresh: Callable[[], nn.Module]  # the same net as initialized
    views: Views  # of pre-training, whose color space and normalization hold here too
    mean: Sequence[float]  # of the set of pre-training
    std: Sequence[float]
    precision: str
    provenance: dict[str, Any]
    home: Path  # where results go
    monitor: dict[str, Any]  # the run's monitor.* values, {} for a bare file
    foreign: bool  # measured on other images than it was trained on
    image_size: int | None  # of pre-training, None where that is not known

    def prepare(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the net was trained to see them."""
        return self.views.finish(images, mean=self.mean, std=self.std)

    def net(self, name: str) -> nn.Module:
        """The net `trained` or as initialized, `random`."""
        return self.trained() if name == "trained" else self.fresh()


def load_subject(config: EvalConfig, device: torch.device) -> tuple[Subject, Source]:
    """The net to measure and the images to measure it on."""
    trust = config.trust
    if config.weights is not None:
        return _bare(config, device)
    run_dir = Path(str(config.run))
    saved = directory.read_config(run_dir)
    check_classes({group: saved.get(group) for group in MEASURED}, trust=trust)
    source, foreign = images_for(config, saved)
    views = build_views(saved["views"], trust=trust)
    path = find_checkpoint(run_dir, config.checkpoint)
    mean, std = saved["dataset"]["mean"], saved["dataset"]["std"]

    def method() -> nn.Module:
        return build_method(
            saved["method"],
            saved["backbone"],
            seed=saved["seed"],
            image_size=saved["dataset"]["image_size"],
            num_images=saved["effective"]["training images"],
            trust=trust,
        ).to(device)

    def trained() -> nn.Module:
        net = method()
        load_strictly(net, checkpoint.load(path, device=device, weights=True)["method"], str(path))
        return net

    wanted = config.precision if config.precision != "auto" else saved["effective"]["precision"]
    provenance = origin(saved, run_dir, path)
    resolved = precision.resolve(wanted, device)
    if not foreign:
        provenance["pretrained_on"] = source.name
    home = run_dir / "eval"
    size, usual = saved["dataset"]["image_size"], saved["monitor"]
    return Subject(trained, method, views, mean, std, resolved, provenance, home, usual, foreign, size), source


def images_for(config: EvalConfig, saved: dict[str, Any]) -> tuple[Source, bool]:
    """The images to measure a run on, and whether they are others than it was trained on.

    They are those of the chosen `dataset`, or else those of the run with the changes of the command line.
    """
    trust = config.trust
    own = dataset_of_run(saved, [], trust=trust)
    chosen = config.dataset
    node = chosen or dataset_of_run(saved, config.dataset_changes, trust=trust)
    try:
        source = build_source(node, trust=trust)
    except ConfigError as error:
        raise ConfigError(f"{error}{'' if chosen else missing_path_hint(node)}") from error
    return source, is_foreign(source, node, own, saved["effective"], trust=trust)


def is_foreign(
    source: Source, node: dict[str, Any], own: dict[str, Any], effective: dict[str, Any], *, trust: list[str]
) -> bool:
    """Whether the images of `source`, built from `node`, are others than those of the set `own` of a run.

    The same images in another place are the run's own. A run that did not store their fingerprint is compared with the
    images where they were, or if there are none any more, by the number of its training images.
    """
    if not has_same_keys(node, own):
        return True
    if has_same_paths(node, own):
        return False
    known: str | None = effective.get(FINGERPRINT)
    if known is None:
        try:
            known = build_source(own, trust=trust).fingerprint
        except ConfigError:
            return bool(len(source.splits["train"]) != effective["training images"])
    return bool(source.fingerprint != known)


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


def type_name(node: dict[str, Any]) -> str:
    """The name of an image set without building it: what torchvision calls it, or its class."""
    return str(node.get("name") or node["_target_"].rpartition(".")[2].lower())


def _bare(config: EvalConfig, device: torch.device) -> tuple[Subject, Source]:
    """A net from a file of its own; one that ssl-export wrote tells how it was made and sees images."""
    path, trust = Path(str(config.weights)), config.trust
    found = load_weights(path, device=device)
    exported = found.keys() >= EXPORTED
    made = current_config(found)[0] if exported else {}
    if not config.dataset:
        raise ConfigError("weights=FILE needs dataset=... as well")
    build_net, facts = _maker(config, made, device)
    source = build_source(config.dataset, trust=trust)

    def fresh() -> nn.Module:
        return build_net(source.image_size)

    def trained() -> nn.Module:
        net = fresh()
        load_strictly(net, found["state_dict"] if exported else found, str(path))
        return net

    provenance = {"weights": str(path.absolute()), "checkpoint_sha256": checkpoint.sha256(path), **facts}
    if exported:
        provenance["exported_from"] = made["provenance"]
    views = build_views(made["views"], trust=trust) if exported else Views([{"crop_scale": None}])
    wanted = made["precision"] if exported and config.precision == "auto" else config.precision
    subject = Subject(
        trained=trained,
        fresh=fresh,
        views=views,
        mean=made.get("mean", source.mean),
        std=made.get("std", source.std),
        precision=precision.resolve(wanted, device),
        provenance=provenance,
        home=path.with_name(path.name + ".eval"),
        monitor=made.get("monitor", {}),
        foreign=_is_foreign_to_file(source, config.dataset, made),
        image_size=made.get("image_size"),
    )
    return subject, source


def _is_foreign_to_file(source: Source, node: dict[str, Any], made: dict[str, Any]) -> bool:
    """Whether images are others than those that the run trained on from which a file was exported.

    Of a file that does not say which those were, all images are others.
    """
    own, known = made.get("dataset"), made.get("image_fingerprint")
    if own is None or not has_same_keys(node, own):
        return True
    return not has_same_paths(node, own) and source.fingerprint != known


def _maker(
    config: EvalConfig, made: dict[str, Any], device: torch.device
) -> tuple[Callable[[int], nn.Module], dict[str, Any]]:
    """What builds the net that a file holds as initialized, for images of a size, and what it is."""
    trust, chosen = config.trust, config.backbone
    if made.get("what", "backbone") == "method":
        _check_whole_method(config, made)

        def method(_: int) -> nn.Module:
            known = {"image_size": made["image_size"], "num_images": made["num_images"]}
            nodes = made["method"], made["backbone"]
            return build_method(*nodes, **known, seed=made["seed"], trust=trust).to(device)

        facts = {name: made[name]["_target_"] for name in ("method", "backbone")}
        return method, facts | {"pretraining_seed": made["seed"]}
    node = chosen or made.get("backbone")
    if not node:
        raise ConfigError("weights=FILE needs backbone=... as well, unless ssl-export wrote the file")
    seed = made.get("seed", 0)

    def backbone(image_size: int) -> nn.Module:
        torch.manual_seed(seed)
        size = made.get("image_size", image_size)
        return made_fast(build_backbone(node, image_size=size, trust=trust).to(device))

    return backbone, {"backbone": node["_target_"], **({"pretraining_seed": seed} if "seed" in made else {})}


def _check_whole_method(config: EvalConfig, made: dict[str, Any]) -> None:
    """Raise ConfigError unless a file with a whole method says all that the method is built from."""
    path = config.weights
    if config.backbone:
        raise ConfigError(f"weights is {path}, which holds a whole method with its backbone: leave out backbone=...")
    absent = [name for name in ("method", "num_images", "seed") if name not in made]
    if absent:
        raise ConfigError(
            f"weights is {path}, which holds a whole method but not its {', '.join(absent)}, as an older sslcli wrote "
            "it: export it again with ssl-export what=method"
        )
    for name in ("num_images", "seed", "image_size"):
        if type(made[name]) is not int:
            raise ConfigError(f"weights is {path}, whose {name} is {made[name]!r}, but it must be a whole number")
    check_classes({group: made.get(group) for group in MEASURED}, trust=config.trust)
