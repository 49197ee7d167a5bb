"""Typical size of the stored images, and the warning about images that are much smaller than `dataset.image_size`."""

from __future__ import annotations

import time
from statistics import median

import torch

from sslcli.data import rng
from sslcli.data.sources.base import Source

SAMPLE = 64  # number of images whose size is read
SECONDS = 0.25  # time after which no further image is read, for slow disks
LARGEST_FACTOR = 2.0  # images that are enlarged by at most this factor cause no warning
_MULTIPLE = 8  # the recommended size is a multiple of this number, because networks halve the size several times


def typical_side(source: Source, *, sample: int = SAMPLE, seconds: float = SECONDS) -> tuple[float, int] | None:
    """Return the median shorter side (in pixels) of sampled training images, and the number of sampled images.

    Return None if the images are in memory or if no image size can be read. The sample is spread over the training
    split. The sample is the same in every call, unless `seconds` pass before all of its images are read. If the format
    of an image stores the size in a header, only this header is read.

    Args:
        source: the dataset.
        sample: the largest number of images.
        seconds: time after which no further image is read.
    """
    train = source.splits["train"]
    if source.images is not None or len(train) == 0:
        return None
    spread = torch.linspace(0, len(train) - 1, min(sample, len(train))).round().long()
    order = rng.mix(0, spread).argsort()  # if the time ends early, the images are still spread over the split
    sides: list[int] = []
    end = time.monotonic() + seconds
    for position in train[spread[order]].tolist():
        size = source.stored_size(position)
        if size is not None:
            sides.append(min(size))
        if time.monotonic() > end:
            break
    return (float(median(sides)), len(sides)) if sides else None


def enlargement_warning(source: Source) -> str | None:
    """Return a warning if `dataset.image_size` is more than `LARGEST_FACTOR` times the typical side, else None.

    The typical side is the median that `typical_side` returns. Images that are much smaller than `dataset.image_size`
    are enlarged in every step, which wastes computation.
    """
    found = typical_side(source)
    if found is None or source.image_size <= LARGEST_FACTOR * found[0]:
        return None
    side, count = found
    wanted = max(_MULTIPLE, -(-round(side) // _MULTIPLE) * _MULTIPLE)
    times = (source.image_size / wanted) ** 2
    return (
        f"the images are small: the shorter side of {count} sampled images has a median of {side:g} pixels, but "
        f"dataset.image_size is {source.image_size}, so the images are enlarged and each step computes about "
        f"{times:.0f} times as many pixels as needed: set dataset.image_size={wanted}"
    )
