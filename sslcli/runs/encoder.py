"""`sslcli.load`: a trained network as a module that maps images in [0, 1] to features."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from yaml import YAMLError

from sslcli.config.annotations import fits, words
from sslcli.config.backbone_choice import UNKNOWN_SIZE, backbone_node
from sslcli.config.channels import DEFAULTS
from sslcli.config.checks import check_range
from sslcli.config.paths import SOURCES_OF_WEIGHTS
from sslcli.config.run_config import NetworkConfig
from sslcli.data.crops import center_crop, to_uint8
from sslcli.data.decode import open_file
from sslcli.data.pixel_format import PixelFormat, pixel_format
from sslcli.distributed import devices
from sslcli.engine.precision import autocast
from sslcli.errors import ConfigError, first_line, is_out_of_memory
from sslcli.evaluation import layers
from sslcli.evaluation.online import BATCH
from sslcli.methods.base import Method
from sslcli.report.console import Screen
from sslcli.runs.subject import (
    Subject,
    read_run,
    read_weight_file,
    subject_of_file,
    subject_of_run,
)
from sslcli.runs.weights_source import numbers, run_or_weights, stated_images, wrong_statistics

_, TIMM = SOURCES_OF_WEIGHTS
Images = Image.Image | str | os.PathLike[str]


class Transform:
    """The test transform: converts an image file or a PIL image to a tensor (C, S, S) with values in [0, 1].

    These are the operations of ssl-eval, with the same bits: the image is decoded to the channels of pre-training, its
    shorter side is resized to S * 8 / 7 pixels with Pillow's antialiased bilinear filter, and the center is cropped to
    S x S pixels. An image of exactly S x S pixels is not resized. The EXIF orientation is ignored. `Encoder` itself
    normalizes the tensor.

    Attributes:
        image_size: S, in pixels.
        pixel_format: number of channels, and mapping of pixel values to 8 bits.
    """

    def __init__(self, image_size: int, pixel_format: PixelFormat) -> None:
        self.image_size, self.pixel_format = image_size, pixel_format

    def __call__(self, image: Images) -> Tensor:
        """Return an image as a tensor (C, S, S) float32 in [0, 1].

        `image` is a PIL image or the path of a file. Raises BadImage if the file cannot be read, and ValueError if the
        image has the wrong number of channels.
        """
        if isinstance(image, Image.Image):
            picture = self.pixel_format.convert(image)
        else:
            picture = open_file(os.fspath(image), pixel_format=self.pixel_format).decode()
        return to_uint8([center_crop(picture, self.image_size)])[0].float() / 255

    def __repr__(self) -> str:
        return f"Transform(image_size={self.image_size}, channels={self.pixel_format.channels})"


class Encoder(nn.Module):
    """Trained network that maps images (N, C, H, W) in [0, 1] to features (N, num_features).

    The images are converted to the color space of pre-training and normalized by this module.

    Attributes:
        network: the evaluated part of the method, such as the backbone. If the method computes its features from
            several networks, this is the whole method.
        transform: converts image files and PIL images to the input of this module, see `Transform`.
        num_features: number of features per image.
        image_size: image size of pre-training in pixels.
        channels: number of channels of the images.
        precision: precision of the forward pass: fp32, bf16 or fp16.
        provenance: JSON values that state the origin of the weights, such as the checkpoint and its SHA-256 digest.
    """

    def __init__(self, subject: Subject, *, image_size: int) -> None:
        super().__init__()
        net = subject.build_trained()
        is_part = isinstance(net, Method) and type(net).features is Method.features
        self.network: nn.Module = net.evaluated_network if is_part and isinstance(net, Method) else net
        self.image_size, self.channels, self.precision = image_size, len(subject.mean), subject.precision
        self.transform = Transform(image_size, pixel_format_of(subject))
        self.provenance = subject.provenance
        self._views, self._mean, self._std = subject.views, subject.mean, subject.std
        self.eval()
        with torch.no_grad():
            blank = torch.zeros(1, self.channels, image_size, image_size, device=next(self.parameters()).device)
            try:
                self.num_features = self(blank).shape[1]
            except (RuntimeError, ValueError, AssertionError) as error:
                if is_out_of_memory(error):
                    raise
                raise ConfigError(
                    f"the network does not accept images of {self.channels} channels and {image_size} x {image_size} "
                    f"pixels ({first_line(error)}): set image_size, and mean and std with a value for each channel"
                ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, num_features) float32 of images (N, C, H, W), float in [0, 1].

        H and W may differ from the image size of pre-training if the network accepts this. Raises ValueError for other
        input.
        """
        self.check(images)
        prepared = self._views.finish(images.float(), mean=self._mean, std=self._std)
        try:
            with autocast(images.device, self.precision):
                features = layers.read(
                    self.network, layers.BACKBONE, prepared.contiguous(memory_format=torch.channels_last)
                )
        except (RuntimeError, ValueError, AssertionError) as error:
            height, width = images.shape[-2:]
            if (height, width) == (self.image_size, self.image_size) or is_out_of_memory(error):
                raise
            raise ValueError(
                f"the images have {height} x {width} pixels, which the network does not accept ({first_line(error)}): "
                f"resize them to {self.image_size} x {self.image_size}, as in pre-training"
            ) from error
        return features.float()

    def check(self, images: Tensor) -> None:
        """Raise ValueError unless `images` are floats in [0, 1] of the shape (N, C, H, W).

        With torch.compile, the values are not checked.
        """
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"the images have the shape {tuple(images.shape)}, but must be (N, {self.channels}, H, W)"
                + (": add a batch dimension with images[None]" if images.ndim == 3 else "")
            )
        if not images.is_floating_point():
            remedy = ": divide them by 255" if images.dtype == torch.uint8 else ""
            raise ValueError(f"the images have the dtype {images.dtype}, but must be floats in [0, 1]{remedy}")
        if torch.compiler.is_compiling() or not images.numel():
            return
        low, high = (value.item() for value in images.aminmax())
        if not (low >= 0 and high <= 1):  # also True for NaN
            raise ValueError(
                f"the images have values from {low:.4g} to {high:.4g}, but they must be in [0, 1]: do not normalize "
                "them, since the network does it, and divide 8-bit values by 255"
            )

    def extra_repr(self) -> str:
        """Return the line that `print(encoder)` shows."""
        return f"num_features={self.num_features}, image_size={self.image_size}, precision={self.precision}"


def load(
    path: str | os.PathLike[str],
    *,
    checkpoint: str | int = "last",
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    backbone: str | Mapping[str, Any] | None = None,
    weights_prefix: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust: Sequence[str] = (),
) -> Encoder:
    """Load a trained network in evaluation mode, see `Encoder`.

    Args:
        path: a run directory, a file of ssl-export, another weight file with `backbone`, or timm:NAME.
        checkpoint: "last", or the number of a step; for a run directory.
        device: auto, cpu, cuda, cuda:1 or mps.
        precision: fp32, bf16 or fp16; "auto" = the precision with which ssl-eval evaluates the run, so that the
            features are bit-identical to those of ssl-eval with the same batches.
        backbone: backbone of a weight file that does not contain its settings: the name of a choice, with changes as in
            "resnet50 stem=imagenet", or a mapping with `_target_`, the name of a class, and its arguments.
        weights_prefix: start of the keys to use, for a weight file with several networks; None = search.
        image_size: image size of `transform` in pixels; None = that of pre-training, or 224 if it is unknown. A weight
            file states it in a preprocessing file beside it, see `stated_images`.
        mean, std: normalization of the images per channel, for a file that does not state it; None = that of the
            preprocessing file or of ImageNet. A run and a file of `ssl-export format=torch` state their own.
        trust: packages whose classes may be used, in addition to sslcli.

    For published weights, a line is printed that states which tensors were taken. Raises ConfigError if the files are
    missing or damaged, or if the weights do not fit the network. The global random state does not change.
    """
    config = network_config(
        path,
        checkpoint=checkpoint,
        device=str(device),
        precision=precision,
        backbone=backbone,
        weights_prefix=weights_prefix,
        image_size=image_size,
        mean=mean,
        std=std,
        trust=trust,
    )
    chosen = devices.pick_device(config.device)
    with devices.unchanged_random_state(chosen):
        subject = subject_of(config, chosen)
        with Screen() as screen:
            for message in subject.messages:
                screen.say(message)
        return Encoder(subject, image_size=subject.image_size or UNKNOWN_SIZE)


@dataclass(frozen=True, kw_only=True)
class FunctionConfig(NetworkConfig):
    """Configuration of `load` and `embed`: with what the caller states about the images. None = what the source states.

    Attributes:
        image_size: side of the images in pixels.
        mean, std: normalization of the images of a weight file, per channel.
    """

    image_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


def network_config(
    path: str | os.PathLike[str],
    *,
    checkpoint: str | int = "last",
    device: str = "auto",
    precision: str = "auto",
    backbone: str | Mapping[str, Any] | None = None,
    weights_prefix: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust: Sequence[str] = (),
    feature_layer: str = layers.BACKBONE,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> FunctionConfig:
    """Return the configuration for the run directory or the weights `path`, see `load` and `embed`.

    Raises ConfigError if the path does not exist, or if a value is out of range or has the wrong type.
    """
    name, is_run = run_or_weights(path)
    if is_run and (backbone is not None or weights_prefix is not None):
        raise ConfigError(f"{name} is a run directory, which states its network: remove backbone and weights_prefix")
    if not is_run and checkpoint != "last":
        raise ConfigError(f"checkpoint is {checkpoint!r}, but {name} is not a run directory: remove checkpoint")
    values: dict[str, Any] = {
        "weights_prefix": weights_prefix,
        "image_size": image_size,
        "trust": trust,
        "feature_layer": feature_layer,
        "batch_size": batch_size,
        "workers": workers,
    }
    kinds = {field.name: str(field.type) for field in fields(FunctionConfig)}
    for key, value in values.items():
        if not fits(value, kinds[key]):
            raise ConfigError(f"{key} is {value!r}, but it must be {words(kinds[key]).replace('null', 'None')}")
    check_range("image_size", image_size, least=1)
    statistics = {"mean": numbers("mean", mean), "std": numbers("std", std)}
    is_file = not is_run and not name.startswith(TIMM)
    stated = stated_images(Path(name)) if is_file and isinstance(backbone, str) else None
    size = image_size or (stated and stated.center_crop) or UNKNOWN_SIZE
    channels = statistics["mean"] or statistics["std"] or (stated and stated.mean) or DEFAULTS["mean"]
    return FunctionConfig(
        run=name if is_run else None,
        weights=None if is_run else name,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        dataset=None,
        backbone=_node(backbone, image_size=size, channels=len(channels)),
        dataset_changes=[],
        **values | statistics | {"trust": list(trust)},
    )


def _node(backbone: str | Mapping[str, Any] | None, *, image_size: int, channels: int) -> dict[str, Any] | None:
    """Return the settings of the argument `backbone` of `load`, for images of a size in pixels."""
    if backbone is None:
        return None
    if isinstance(backbone, str):
        try:
            return backbone_node(backbone, image_size=image_size, channels=channels)
        except YAMLError as error:
            raise ConfigError(f"backbone is {backbone!r}, which is not valid YAML: correct its values") from error
    if not isinstance(backbone, Mapping) or not isinstance(backbone.get("_target_"), str):
        raise ConfigError(
            f"backbone is {backbone!r}, but it must be a text such as 'resnet50 stem=imagenet', or a dictionary with "
            "_target_, the name of a class"
        )
    return dict(backbone)


def subject_of(config: NetworkConfig, device: torch.device) -> Subject:
    """Return the network of a run directory or weight file, without images.

    The size of the images of a weight file is that of `config`, else that which the file states, else that of the
    chosen backbone, else `UNKNOWN_SIZE`. Raises ConfigError if `config` states another normalization than a run.
    """
    stated = config if isinstance(config, FunctionConfig) else None
    weights = None if config.run is not None else read_weight_file(config)
    own_size = stated and stated.image_size
    if stated and (stated.mean or stated.std) and (weights is None or weights.exported):
        raise ConfigError(
            f"mean is {stated.mean} and std is {stated.std}, but {config.run or config.weights} states its "
            "normalization: remove mean and std"
        )
    if weights is None:
        subject = subject_of_run(config, read_run(config), device)
        return replace(subject, image_size=own_size or subject.image_size)
    given = (stated and stated.mean, stated and stated.std)
    mean, std = given[0] or weights.mean or DEFAULTS["mean"], given[1] or weights.std or DEFAULTS["std"]
    wrong = wrong_statistics(mean, std)
    if wrong and not weights.exported:
        raise ConfigError(f"{wrong}: correct the arguments mean and std")
    in_node = (config.backbone or {}).get("image_size")
    size = own_size or weights.image_size or (in_node if isinstance(in_node, int) else None) or UNKNOWN_SIZE
    weights = replace(weights, mean=mean, std=std)
    settings = "mean and std" if stated else "dataset.mean and dataset.std"
    subject = subject_of_file(config, weights, device, image_size=size, mean=mean, std=std, settings=settings)
    return replace(subject, image_size=size)


def pixel_format_of(subject: Subject) -> PixelFormat:
    """Return the format to which images are decoded for a network, as in pre-training.

    If pre-training did not decode files, images of more than 8 bits are mapped to 8 bits with the rule "auto".
    """
    return pixel_format(len(subject.mean), subject.dataset.get("value_range", "auto"))
