"""Loading of the network that ssl-eval evaluates, from a run, a weight file or timm, and of the evaluated images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.config.added import resumed_dataset, with_added_keys, without_added_keys
from sslcli.config.channels import with_channels_of
from sslcli.config.own_dataset import FINGERPRINT, dataset_of_run, has_same_keys, has_same_paths, missing_path_hint
from sslcli.config.paths import results_dir_of
from sslcli.config.run_config import NetworkConfig
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.engine import precision
from sslcli.errors import ConfigError
from sslcli.methods.base import Method
from sslcli.runs import directory
from sslcli.runs.build import accelerate, build_backbone, build_method, build_source, build_views, check_classes
from sslcli.runs.checkpoint_of_run import load_checkpoint, provenance_of
from sslcli.runs.teacher import stored_features
from sslcli.runs.weights_source import NETWORK_GROUPS, WeightsSource, open_weights
from sslcli.weights.files import load_strictly, wrapped
from sslcli.weights.published import find_weights, suggested_backbone


@dataclass(frozen=True)
class Subject:
    """A network to evaluate, its provenance, and the preprocessing of its images."""

    build_trained: Callable[[], nn.Module]  # returns the network with trained weights
    build_untrained: Callable[[], nn.Module]  # returns the network before training
    views: Views  # views of pre-training; only color space and normalization are used
    mean: Sequence[float]  # per channel, as used in pre-training: 0 and 1 without normalization
    std: Sequence[float]
    precision: str
    provenance: dict[str, Any]
    results_dir: Path
    monitor: dict[str, Any]  # settings monitor.* of the run; {} if a weight file has none
    has_other_images: bool  # True if pre-training did not use the images of the evaluation
    image_size: int | None  # image size of pre-training in pixels; None if unknown
    dataset: dict[str, Any]  # settings of the dataset of pre-training; {} if unknown
    evaluated_part: str = Method.evaluated_part  # of an exported backbone; a method has its own attribute
    messages: Sequence[str] = ()  # about the weights, for the user

    def prepare(self, images: Tensor) -> Tensor:
        """Apply the color space and normalization of pre-training to images in [0, 1]."""
        return self.views.finish(images, mean=self.mean, std=self.std)

    def net(self, name: str) -> nn.Module:
        """Return the trained network if `name` is "trained", or the network before training if it is "random"."""
        return self.build_trained() if name == "trained" else self.build_untrained()


def load_subject(config: NetworkConfig, device: torch.device) -> tuple[Subject, Source]:
    """Return the network to evaluate and the images to evaluate it on."""
    if config.weights is not None:
        return _load_weight_file(config, device)
    saved = read_run(config)
    source, has_other_images = images_for(config, saved)
    subject = subject_of_run(config, saved, device)
    if not has_other_images:
        named = subject.provenance | {"pretrained_on": source.name}
        subject = replace(subject, has_other_images=False, provenance=named)
    return subject, source


def read_run(config: NetworkConfig) -> dict[str, Any]:
    """Return the stored configuration of the run `config.run`. Raises ConfigError if its classes are not trusted."""
    saved = directory.read_trained_config(Path(str(config.run)))
    check_classes({group: saved.get(group) for group in NETWORK_GROUPS}, trust=config.trust)
    return saved


def subject_of_run(config: NetworkConfig, saved: dict[str, Any], device: torch.device) -> Subject:
    """Return the network of a run, for images that need not be those of pre-training. `saved` is from `read_run`."""
    run_dir, trust = Path(str(config.run)), config.trust
    directory.check_input(run_dir, saved)
    views = build_views(saved["views"], trust=trust)
    loaded = load_checkpoint(run_dir, config.checkpoint, saved)
    mean, std = views.statistics(mean=saved["dataset"]["mean"], std=saved["dataset"]["std"])

    def build_untrained() -> nn.Module:
        return build_method(
            saved["method"],
            saved["backbone"],
            seed=saved["seed"],
            image_size=saved["dataset"]["image_size"],
            num_images=saved["effective"]["training images"],
            trust=trust,
            teacher_features=stored_features(saved["effective"]),
        ).to(device)

    def build_trained() -> nn.Module:
        net = build_untrained()
        load_strictly(net, loaded.weights, str(loaded.path))
        return net

    requested = config.precision if config.precision != "auto" else saved["effective"]["precision"]
    return Subject(
        build_trained=build_trained,
        build_untrained=build_untrained,
        views=views,
        mean=mean,
        std=std,
        precision=precision.resolve(requested, device),
        provenance=provenance_of(saved, run_dir, loaded),
        results_dir=run_dir / "eval",
        monitor=saved["monitor"],
        has_other_images=True,
        image_size=saved["dataset"]["image_size"],
        dataset=saved["dataset"],
    )


def images_for(config: NetworkConfig, saved: dict[str, Any]) -> tuple[Source, bool]:
    """Return the images to evaluate on, and a boolean: True if the run was trained on other images.

    If the command line chooses a `dataset`, its images are returned. Otherwise, the images of the run's dataset are
    returned, with the overrides `dataset.KEY=value` applied. `saved` is the configuration of the run.
    """
    trust = config.trust
    own = dataset_of_run(saved, [], trust=trust)
    chosen = with_channels_of(config.dataset, len(own["mean"])) if config.dataset else None
    node = (
        as_in_pretraining(chosen, own, config.set_keys)
        if chosen
        else dataset_of_run(saved, config.dataset_changes, trust=trust)
    )
    try:
        source = build_source(node, trust=trust)
    except ConfigError as error:
        raise ConfigError(f"{error}{'' if chosen else missing_path_hint(node)}") from error
    return source, has_other_images_than_run(source, node, own, saved["effective"], trust=trust)


def as_in_pretraining(node: dict[str, Any], own: dict[str, Any], set_keys: Collection[str]) -> dict[str, Any]:
    """Return the settings of the chosen dataset. If it is the dataset of pre-training, it behaves as in pre-training.

    The network may have been pre-trained with an older version, in which some settings of datasets did not exist. If
    the chosen dataset is the dataset of pre-training, these settings get the values that reproduce the behavior of the
    older version. If it is another dataset, `node` is returned unchanged.

    Args:
        node: the settings of the chosen dataset.
        own: the settings of the dataset of pre-training.
        set_keys: the dotted keys that the command line sets. They are not changed.
    """
    found = resumed_dataset(node, own, set_keys)
    return found if has_same_keys(found, with_added_keys(own, found)) else node


def has_other_images_than_run(
    source: Source, node: dict[str, Any], own: dict[str, Any], effective: dict[str, Any], *, trust: list[str]
) -> bool:
    """Return True if the images of `source` are not the images of the dataset of a run.

    First, the dataset settings are compared. If only the paths differ, the same images may have been moved to another
    folder. In this case, the fingerprints of both datasets are compared. The fingerprint identifies the images of a
    dataset. If the run stored no fingerprint, it is computed from the images at the old path. If the old path no longer
    exists, only the numbers of training images are compared.

    Args:
        source: the dataset.
        node: the settings of `source`.
        own: the dataset settings of the run.
        effective: the section `effective` of the run's config.yaml.
        trust: trusted packages, see `find_class`.
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


def _load_weight_file(config: NetworkConfig, device: torch.device) -> tuple[Subject, Source]:
    """Return the network of a weight file or of timm, and the images to evaluate it on.

    The images are those of the setting `dataset`. If ssl-export wrote the file, the settings of the network's run are
    read from the file.
    """
    weights = read_weight_file(config)
    if not config.dataset:
        raise ConfigError("weights=FILE requires dataset=...: choose the images to evaluate on")
    exported = weights.exported
    node = with_channels_of(config.dataset, len(exported["mean"])) if exported else config.dataset
    if exported.get("dataset") is not None:
        node = as_in_pretraining(node, exported["dataset"], config.set_keys)
    source = build_source(node, trust=config.trust)
    subject = subject_of_file(config, weights, device, image_size=source.image_size, mean=source.mean, std=source.std)
    return replace(subject, has_other_images=_has_other_images_than_export(source, node, exported)), source


def read_weight_file(config: NetworkConfig) -> WeightsSource:
    """Return the weights that `config.weights` names, see `open_weights`.

    Raises ConfigError if neither their source nor `config` names the backbone.
    """
    weights = open_weights(str(config.weights), trust=config.trust)
    if not (config.backbone or weights.backbone):
        hint = suggested_backbone(weights.content)
        raise ConfigError(
            f"weights=FILE requires backbone=..., unless ssl-export format=torch wrote the file{hint and ': ' + hint}"
        )
    return weights


def subject_of_file(
    config: NetworkConfig,
    weights: WeightsSource,
    device: torch.device,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    settings: str = "dataset.mean and dataset.std",
) -> Subject:
    """Return the network of a weight file or of timm, for images that need not be those of pre-training.

    If the source does not state them, `image_size`, in pixels, and `mean` and `std`, one value per channel, describe
    its images. Values of `mean` and `std` on the command line precede those of timm. `settings` names the settings of
    the user that change these values, for a message.
    """
    exported, trust = weights.exported, config.trust
    build_net, facts = _network_builder(config, weights, device)
    build_untrained = partial(build_net, image_size, len(mean))
    state, messages, found = _state(config, weights, build_untrained)

    def build_trained() -> nn.Module:
        net = build_untrained()
        remedy = "Remove backbone=...: the file states its backbone" if exported else "Give the backbone it belongs to"
        load_strictly(net, wrapped(net, state), weights.where, remedy=remedy)
        return net

    provenance = {**weights.provenance, **found, **facts}
    if exported:
        provenance["exported_from"] = exported["provenance"]
    views = build_views(exported["views"], trust=trust) if exported else Views([{"crop_scale": None}])
    # Exports of older versions contain the mean and std of the dataset, even if images were not normalized.
    chosen = () if exported else config.set_keys
    mean = mean if weights.mean is None or "dataset.mean" in chosen else weights.mean
    std = std if weights.std is None or "dataset.std" in chosen else weights.std
    mean, std = views.statistics(mean=mean, std=std)
    if not exported:
        messages.append(
            f"images are normalized with mean {list(mean)} and std {list(std)}: if the weights were trained with other "
            f"values, set {settings}"
        )
    requested = exported["precision"] if exported and config.precision == "auto" else config.precision
    return Subject(
        build_trained=build_trained,
        build_untrained=build_untrained,
        views=views,
        mean=mean,
        std=std,
        precision=precision.resolve(requested, device),
        provenance=provenance,
        results_dir=results_dir_of(str(config.weights)),
        monitor=exported.get("monitor", {}),
        has_other_images=True,
        image_size=exported.get("image_size"),
        dataset=exported.get("dataset") or {},
        evaluated_part=exported.get("evaluated_part", Method.evaluated_part),
        messages=messages,
    )


def _state(
    config: NetworkConfig, weights: WeightsSource, build_untrained: Callable[[], nn.Module]
) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Return the state dict of the network, messages about it, and its provenance.

    A file of ssl-export must contain exactly the weights of the network. In other weights, they are searched.
    """
    prefix = config.weights_prefix
    if weights.exported:
        if prefix is not None:
            raise ConfigError(
                f"weights_prefix is {prefix!r}, but ssl-export wrote {weights.where}, which contains a single network: "
                "remove weights_prefix"
            )
        return weights.content, [], {}
    found = find_weights(weights.content, build_untrained(), prefix=prefix, where=weights.where)
    return found.state, [found.summary(weights.where)], found.provenance()


def _has_other_images_than_export(source: Source, node: dict[str, Any], exported: dict[str, Any]) -> bool:
    """Return True if the images of `source` are not the images on which the exported network was pre-trained.

    `node` contains the settings of `source`. `exported` is the content of the file that ssl-export wrote. If this file
    has no settings of the pre-training dataset, the result is True.
    """
    own, known = exported.get("dataset"), exported.get("image_fingerprint")
    if own is None:
        return True
    node = without_added_keys(node, own)  # an older version may have written the file
    if not has_same_keys(node, own):
        return True
    return not has_same_paths(node, own) and source.fingerprint != known


def _network_builder(
    config: NetworkConfig, weights: WeightsSource, device: torch.device
) -> tuple[Callable[[int, int], nn.Module], dict[str, Any]]:
    """Return two values: a function that builds the untrained network, and the provenance of the network.

    The arguments of the function are an image size in pixels and the number of channels. If ssl-export wrote the
    weights, the function uses the values of pre-training instead.
    """
    trust, exported = config.trust, weights.exported
    if exported.get("what", "backbone") == "method":
        _check_whole_method(config, exported)

        def method(_size: int, _channels: int) -> nn.Module:
            known = {"image_size": exported["image_size"], "num_images": exported["num_images"]}
            known["teacher_features"] = exported.get("teacher_features")
            nodes = exported["method"], exported["backbone"]
            return build_method(*nodes, **known, seed=exported["seed"], trust=trust).to(device)

        facts = {name: exported[name]["_target_"] for name in ("method", "backbone")}
        return method, facts | {"pretraining_seed": exported["seed"]}
    node = config.backbone or weights.backbone or {}
    seed = exported.get("seed", 0)
    is_complete = bool(exported or config.backbone)  # timm states only a name

    def backbone(image_size: int, channels: int) -> nn.Module:
        torch.manual_seed(seed)
        size = exported.get("image_size", image_size)
        complete = node if is_complete else node | {"image_size": size, "in_channels": channels}
        return accelerate(build_backbone(complete, image_size=size, trust=trust).to(device))

    return backbone, {"backbone": node["_target_"], **({"pretraining_seed": seed} if "seed" in exported else {})}


def _check_whole_method(config: NetworkConfig, exported: dict[str, Any]) -> None:
    """Raise ConfigError unless a file exported with what=method contains all settings that the method needs."""
    path = config.weights
    if config.backbone:
        raise ConfigError(f"weights is {path}, which contains a whole method with its backbone: remove backbone=...")
    absent = [name for name in ("method", "num_images", "seed") if name not in exported]
    if absent:
        raise ConfigError(
            f"weights is {path}, which contains a whole method but not its {', '.join(absent)}, since an older sslcli "
            "wrote it: export it again with ssl-export what=method"
        )
    for name in ("num_images", "seed", "image_size"):
        if type(exported[name]) is not int:
            raise ConfigError(f"weights is {path}, whose {name} is {exported[name]!r}, but it must be an integer")
    check_classes({group: exported.get(group) for group in NETWORK_GROUPS}, trust=config.trust)
