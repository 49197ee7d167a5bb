"""`sslcli.load`: a trained network as a module that maps images in [0, 1] to features."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sslcli.config.backbone_choice import backbone_node
from sslcli.config.channels import DEFAULTS
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
from sslcli.runs.weights_source import source_inside

RUN, TIMM = SOURCES_OF_WEIGHTS
UNKNOWN_SIZE = 224  # image size in pixels if a weight file does not contain it
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
            self.num_features = self(blank).shape[1]

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
        image_size: image size of `transform` in pixels; None = that of pre-training, or 224 if it is unknown.
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
        image_size=image_size or UNKNOWN_SIZE,
        trust=trust,
    )
    chosen = devices.pick_device(config.device)
    with devices.unchanged_random_state(chosen):
        subject = subject_of(config, chosen, image_size=image_size or UNKNOWN_SIZE)
        with Screen() as screen:
            for message in subject.messages:
                screen.say(message)
        return Encoder(subject, image_size=image_size or subject.image_size or UNKNOWN_SIZE)


def network_config(
    path: str | os.PathLike[str],
    *,
    checkpoint: str | int = "last",
    device: str = "auto",
    precision: str = "auto",
    backbone: str | Mapping[str, Any] | None = None,
    weights_prefix: str | None = None,
    image_size: int = UNKNOWN_SIZE,
    trust: Sequence[str] = (),
    feature_layer: str = layers.BACKBONE,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> NetworkConfig:
    """Return the configuration for the run directory or the weights `path`, see `load` and `embed`.

    Raises ConfigError if the path does not exist or a value is out of range.
    """
    name = os.fspath(path)
    is_timm = name.startswith(TIMM)
    if not is_timm:
        name = os.path.expanduser(name.removeprefix(RUN))
        if not os.path.exists(name):
            raise ConfigError(f"there is no run directory or weight file {name!r}")
    is_run = os.path.isdir(name)
    remedy = source_inside(Path(name)) if is_run and not os.path.exists(os.path.join(name, "config.yaml")) else ""
    if remedy:
        raise ConfigError(f"{name} is a folder, but not a run directory{remedy}")
    if is_run and (backbone is not None or weights_prefix is not None):
        raise ConfigError(f"{name} is a run directory, which states its network: remove backbone and weights_prefix")
    node = backbone_node(backbone, image_size=image_size) if isinstance(backbone, str) else backbone
    return NetworkConfig(
        run=name if is_run else None,
        weights=None if is_run else name,
        weights_prefix=weights_prefix,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        trust=list(trust),
        dataset=None,
        backbone=None if node is None else dict(node),
        dataset_changes=[],
        feature_layer=feature_layer,
        batch_size=batch_size,
        workers=workers,
    )


def subject_of(config: NetworkConfig, device: torch.device, *, image_size: int = UNKNOWN_SIZE) -> Subject:
    """Return the network of a run directory or weight file, without images.

    `image_size` is the size in pixels for which the network is built if the file does not state it.
    """
    if config.run is not None:
        return subject_of_run(config, read_run(config), device)
    weights = read_weight_file(config)
    return subject_of_file(config, weights, device, image_size=image_size, mean=DEFAULTS["mean"], std=DEFAULTS["std"])


def pixel_format_of(subject: Subject) -> PixelFormat:
    """Return the format to which images are decoded for a network, as in pre-training.

    If pre-training did not decode files, images of more than 8 bits are mapped to 8 bits with the rule "auto".
    """
    return pixel_format(len(subject.mean), subject.dataset.get("value_range", "auto"))
