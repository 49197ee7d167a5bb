"""Images of an export with the run: the same images must give the same features."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslcli.config.own_dataset import dataset_of_run
from sslcli.data.loader import plain_batches
from sslcli.errors import ConfigError, first_line
from sslcli.runs.build import build_source

NUM_IMAGES = 32
TOLERANCE = 1e-5  # largest relative difference of features in float32, see `difference`


@dataclass(frozen=True)
class Images:
    """Images on which the features of an export and of the run are compared.

    Attributes:
        images: (N, C, S, S) float32 in [0, 1].
        origin: phrase that states where the images come from, for messages.
        is_native: True if all images of the dataset are squares of S pixels, so that no image is resized.
    """

    images: Tensor
    origin: str
    is_native: bool = False


def comparison_images(saved: dict[str, Any], *, trust: list[str]) -> Images:
    """Return images of the dataset of a run, or noise if the dataset cannot be read.

    `saved` is the configuration of the run. The images come from the splits val, train and test, in this order. Missing
    files are not downloaded if the dataset has the setting `download`.
    """
    size, channels = saved["dataset"]["image_size"], len(saved["dataset"]["mean"])
    try:
        node = dataset_of_run(saved, [], trust=trust)
        node |= {"download": False} if "download" in node else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about files that are unreadable or in two splits
            source = build_source(node, trust=trust)
        splits = [
            source.splits[name][: 2 * NUM_IMAGES].tolist() for name in ("val", "train", "test") if name in source.splits
        ]
        first = dict.fromkeys(itertools.chain(*splits))  # each image once
        positions = torch.tensor(list(first)[:NUM_IMAGES])
        images, is_readable = next(iter(plain_batches(source, positions, batch_size=NUM_IMAGES, workers=0)))
        if not is_readable.any():
            raise ConfigError(f"the first {len(positions)} images cannot be read")
    except (ConfigError, OSError) as error:
        noise = torch.rand(NUM_IMAGES, channels, size, size, generator=torch.Generator().manual_seed(0))
        return Images(noise, f"{NUM_IMAGES} noise images, since the dataset cannot be read ({first_line(error)})")
    images = images[is_readable].float() / 255
    is_native = source.images is not None and source.images.shape[2:] == (size, size)
    return Images(images, f"{len(images)} images of {source.name}", is_native)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference of two feature matrices (N, D), relative to the largest feature.

    The difference is divided by the largest absolute value of `expected`.

    Raises ConfigError if the shapes differ.
    """
    if found.shape != expected.shape:
        raise ConfigError(f"its features have the shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found.double() - expected.double()).abs().max() / scale)


@torch.inference_mode()
def features_of(net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the features (N, D) of images (N, C, S, S) as float32 on the CPU. `net` must be in evaluation mode."""
    return net(images).float().cpu()


def check_difference(found: float, name: str, images: Images) -> None:
    """Raise ConfigError unless `found`, the relative difference of features, is at most `TOLERANCE`.

    `name` is the export format. The message states that the export was removed.
    """
    if not found <= TOLERANCE:
        raise ConfigError(
            f"format={name}: the export was removed, since its features on {images.origin} differ by {found:.1e} "
            f"of the largest feature, and at most {TOLERANCE:.0e} is allowed: choose another format"
        )


def result_of(found: float, images: Images) -> str:
    """Return the sentence that states the result of a comparison. `found` is the relative difference."""
    return (
        f"After loading, the features differ from those of the run by at most {found:.1e} of the largest feature, in "
        f"float32 on {images.origin} (allowed: {TOLERANCE:.0e})."
    )
