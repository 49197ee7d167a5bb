"""Datasets that run in the data workers: decode each image once, crop and resize all of its views, return uint8.

The random crop boxes are given in pixels of the full-size image. If every crop of a JPEG is downscaled at least by 2, 4
or 8, the JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is faster. The boxes are then scaled down by the same
factor. Even in the reduced image, every box has at least as many pixels per side as the view to which it is resized.
docs/performance.md reports the speed, and the difference between the pixels of reduced and full-size decoding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from sslcli.data import rng
from sslcli.data.bad_images import BadImage
from sslcli.data.decode import DIVISORS
from sslcli.data.pixels import Pixels
from sslcli.data.sources.base import OpenedImage, Picture, Source, replacement
from sslcli.data.views.views import Views
from sslcli.errors import ConfigError
from sslcli.kernels import resize

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
BadImageList = list[tuple[str, str]]  # path and reason of each bad image
PictureAndBoxes = tuple[Picture, list[list[int]]]  # a picture and one crop box per view: top, left, height, width

_MAX_REPLACEMENTS = 20  # maximum number of replacement images to try if an image cannot be read
_MAX_FILES_IN_MEMORY = 128  # number of images of a request that are opened before the first of them is decoded
_MAX_ASPECT = 64  # largest ratio of the sides of an image that is resized whole for evaluation
_SMALL_SIDE = 64  # pixels; images of equal size with no longer side are cropped in one call, which is faster


@dataclass(frozen=True)
class Request:
    """Request to a data worker for n images: the micro-batch of one process, or a part of this micro-batch."""

    index: Tensor  # (n,) index of each image in the training split
    occurrence: Tensor  # (n,) epoch + 2**32 * repetition of each image in the epoch, see epoch_order
    is_last_read: Tensor  # (n,) bool, True if the chunk of a shard can be freed after this image, see last_read_mask


def concat_requests(requests: Sequence[Request]) -> Request:
    """Concatenate the images of several requests to one request, in order."""
    return Request(*(torch.cat([getattr(request, column.name) for request in requests]) for column in fields(Request)))


class ViewCrops(Dataset[tuple[Request, list[Tensor], Tensor, BadImageList]]):
    """Dataset of views for training. It is indexed by `Request` objects, each of which asks for n images.

    An item is a tuple of four values:
    - the request
    - the views: one tensor (n, C, S, S) uint8 per view
    - (n,) the positions in `source` of the images that were read; a bad image is replaced by another image
    - the path of each bad image, and the reason why it cannot be read

    Args:
        source: the dataset of files or shards.
        views: the distributions from which the views of each image are drawn.
        seed: seed of the views.
    """

    def __init__(self, source: Source, views: Views, seed: int) -> None:
        self.source, self.views, self.seed = source, views, seed
        self.sizes = views.sizes(source.image_size)

    def __getitem__(self, request: Request) -> tuple[Request, list[Tensor], Tensor, BadImageList]:
        positions = self.source.splits["train"][request.index]
        self.source.hold(positions)
        key = rng.mix(self.seed, request.occurrence, request.index)
        views = [torch.empty(len(key), self.source.channels, size, size, dtype=torch.uint8) for size in self.sizes]
        read = positions.clone()
        bad: BadImageList = []
        for start in range(0, len(key), _MAX_FILES_IN_MEMORY):
            rows = list(range(start, min(start + _MAX_FILES_IN_MEMORY, len(key))))
            bad += self.write_crops(rows, positions, key, views, read)
        self.source.release(positions[request.is_last_read])
        return request, views, read, bad

    def write_crops(
        self, rows: list[int], positions: Tensor, key: Tensor, views: list[Tensor], read: Tensor
    ) -> BadImageList:
        """Write the crops of some of the n images of a request into `views`. Bad images are replaced.

        The function `replacement` selects the image that replaces a bad image.

        Args:
            rows: index in the request, from 0 to n - 1, of each image whose crops are written.
            positions: (n,) position of each requested image in the dataset.
            key: (n,) int64. All random numbers of an image are computed from its key.
            views: one tensor (n, C, S, S) uint8 per view, for the output.
            read: (n,) int64, for the output: the position in the dataset of the image that was read.

        Returns:
            The path of each image that cannot be read, and the reason.

        Raises:
            ConfigError: an image and all of its replacements cannot be read.
        """
        bad: BadImageList = []
        for attempt in range(_MAX_REPLACEMENTS + 1):
            opened: dict[int, OpenedImage] = {}
            failed = []
            for row in rows:
                if attempt > 0:
                    read[row] = replacement(self.source, int(positions[row]), attempt)
                try:
                    opened[row] = self.source.open(int(read[row]))
                except BadImage as error:
                    failed.append((row, error))
            boxes, divisors = self.boxes(list(opened.values()), key[list(opened)])
            small: dict[tuple[int, int], dict[int, PictureAndBoxes]] = defaultdict(dict)
            for number, (row, image) in enumerate(opened.items()):
                try:
                    picture = image.decode(divisors[number])
                except BadImage as error:
                    failed.append((row, error))
                    continue
                if picture.size == image.size and is_small(picture) and resize.library() is not None:
                    small[picture.size][row] = (picture, boxes[number])
                    continue
                for view, crop in enumerate(self.crop_views(picture, image.size, boxes[number])):
                    views[view][row] = crop
            for group in small.values():
                self.crop_together(group, views)
            bad += [(error.path, error.reason) for _, error in failed]
            rows = sorted(row for row, _ in failed)
            if not rows:
                return bad
        path, _ = bad[-1]
        raise ConfigError(
            f"an image and its {_MAX_REPLACEMENTS} replacements cannot be read, the last being {path}: repair or "
            "remove the bad images"
        ) from failed[-1][1]

    def boxes(self, images: list[OpenedImage], key: Tensor) -> tuple[list[list[list[int]]], list[int]]:
        """Return two values per image: the crop boxes of all views, and the divisor for `OpenedImage.decode`.

        A box is (top, left, height, width) in pixels of the full-size image. An image is decoded at 1/divisor of its
        size. The divisor is the largest one with which every crop still has at least as many pixels per side as its
        view.

        key: (n,) int64. All random numbers of an image are computed from its key.
        """
        if not images:
            return [], []
        width, height = torch.tensor([image.size for image in images]).unbind(1)
        boxes = torch.stack([self.views.boxes(view, key, height, width) for view in range(len(self.sizes))], 1)
        if not self.source.scaled_decode:
            return boxes.tolist(), [1] * len(images)
        factors = (boxes[:, :, 2:] // torch.tensor(self.sizes).view(1, -1, 1)).flatten(1).amin(1)
        return boxes.tolist(), [max(d for d in DIVISORS if d <= max(1, factor)) for factor in factors.tolist()]

    def crop_together(self, group: dict[int, PictureAndBoxes], views: list[Tensor]) -> None:
        """Crop full-size pictures that all have the same size, with one call per view.

        group: maps indices to pairs of a picture and its boxes, one box per view. The crops of the picture are written
            to this index of the tensors in `views`.
        views: one tensor (n, C, S, S) uint8 per view, for the output.
        """
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture, _ in group.values()]))
        boxes = torch.tensor([boxes for _, boxes in group.values()])
        for number, (out, size, view) in enumerate(zip(views, self.sizes, self.views.views, strict=True)):
            cubic = view.interpolation == "bicubic"
            out[list(group)] = resize.resized_bytes(pixels, boxes[:, number], size, cubic=cubic)

    def crop_views(self, picture: Picture, full_size: tuple[int, int], boxes: list[list[int]]) -> list[Tensor]:
        """Return one crop (C, S, S) uint8 per view. S is the side of the view in pixels.

        picture: the decoded image, at full size or at a reduced size.
        full_size: width and height of the full-size image.
        boxes: one box (top, left, height, width) per view, in pixels of the full-size image.
        """
        filters = [view.interpolation for view in self.views.views]
        if picture.size != full_size:
            assert isinstance(picture, (Image.Image, Pixels))
            scale = max(round(full / part) for full, part in zip(full_size, picture.size, strict=True))
            scaled_boxes = [[number / scale for number in box] for box in boxes]
            return [
                crop_and_resize_fractional(picture, *crop)
                for crop in zip(scaled_boxes, self.sizes, filters, strict=True)
            ]
        if isinstance(picture, (Image.Image, Pixels)):
            pixels = torch.from_numpy(np.require(picture, np.uint8, "W")).permute(2, 0, 1)
            return [crop_and_resize(pixels, *crop) for crop in zip(boxes, self.sizes, filters, strict=True)]
        crops = [
            picture.crop((left, top, left + width, top + height)).resize((size, size), RESAMPLE[filter_name])
            for (top, left, height, width), size, filter_name in zip(boxes, self.sizes, filters, strict=True)
        ]
        return [to_uint8([crop])[0] for crop in crops]


def is_small(picture: Picture) -> bool:
    """Return whether a picture is one image (not several modalities) with sides of at most `_SMALL_SIDE` pixels."""
    return isinstance(picture, (Image.Image, Pixels)) and max(picture.size) <= _SMALL_SIDE


def crop_and_resize(pixels: Tensor, box: Sequence[int], size: int, interpolation: str) -> Tensor:
    """Crop a box (top, left, height, width) of (C, H, W) uint8 and resize it to (size, size), antialiased.

    Due to rounding, the values (0 to 255) differ from the values of Pillow by at most 1. This function takes less than
    half of Pillow's time, because torch has vectorized code for uint8 in channels-last layout.
    """
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]
    return interpolate(part, size=(size, size), mode=interpolation, antialias=True)[0]


def crop_and_resize_fractional(
    picture: Image.Image | Pixels, box: Sequence[float], size: int, interpolation: str
) -> Tensor:
    """Crop a box with fractional coordinates and resize it to (C, size, size) uint8.

    Pixels outside of the box have no effect.
    """
    top, left, height, width = box
    x, y = math.floor(left), math.floor(top)
    right, bottom = min(left + width, picture.width), min(top + height, picture.height)
    part = picture.crop((x, y, math.ceil(right), math.ceil(bottom)))
    inside = (left - x, top - y, right - x, bottom - y)
    return to_uint8([part.resize((size, size), RESAMPLE[interpolation], box=inside)])[0]


class PlainCrops(Dataset[tuple[Tensor, Tensor]]):
    """Dataset of images for evaluation. It is indexed by tensors (n,) of positions in `source`.

    An item is a tuple of the images (n, C, S, S) uint8 and a mask (n,) bool. The mask is False for images that cannot
    be read. Each of them is replaced by a blank image.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        size, images, readable = self.source.image_size, [], []
        for position in positions.tolist():
            try:
                images.append(center_crop(self.source.read(position), size))
                readable.append(True)
            except BadImage:
                images.append(self.source.blank(size))
                readable.append(False)
        return to_uint8(images), torch.tensor(readable)


def center_crop(image: Picture, size: int) -> Picture:
    """Resize the shorter side to size * 8 / 7 pixels and crop the center to size x size.

    An image of exactly size x size is returned unchanged. If one side is more than `_MAX_ASPECT` times the other side,
    the ends of the longer side are removed before the image is resized.
    """
    if image.size == (size, size):
        return image
    image = _without_ends(image)
    scale = round(size * 8 / 7) / min(image.size)
    wide = image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))), RESAMPLE["bilinear"]
    )
    left, top = (wide.width - size) // 2, (wide.height - size) // 2
    return wide.crop((left, top, left + size, top + size))


def _without_ends(image: Picture) -> Picture:
    """Shorten the longer side of an image to about `_MAX_ASPECT` times the shorter side.

    The same number of pixels is removed at both ends, so the center does not move. If the longer side is at most
    `_MAX_ASPECT` times the shorter side, the image is returned unchanged.
    """
    # The whole image is resized before its center is cropped. Resized to a short side of 256 pixels, an image of
    # 16000 x 1 pixels would need gigabytes of memory.
    extra = [max(0, side - _MAX_ASPECT * min(image.size)) // 2 for side in image.size]
    if not any(extra):
        return image
    left, top = extra
    return image.crop((left, top, image.width - left, image.height - top))


def to_uint8(images: Sequence[Picture]) -> Tensor:
    """Stack images of equal size into a tensor (n, C, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
