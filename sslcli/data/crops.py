"""What a data worker does: decode each image once, cut and resize all of its views, hand over uint8.

Crop boxes are drawn in the pixels of the whole image. A JPEG of which every crop is shrunk by 2, 4 or 8 at least is
decoded at that share of its size, which costs less, and the boxes shrink with it: no crop has fewer pixels than its
result because of that. See docs/performance.md for what it saves and changes.
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
from sslcli.data.decode import DIVISORS, Pixels
from sslcli.data.sources.base import Opened, Picture, Source, replacement
from sslcli.data.views.views import Views
from sslcli.errors import ConfigError
from sslcli.kernels import resize

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
BadList = list[tuple[str, str]]
Drawn = tuple[Picture, list[list[int]]]  # of each view: top, left, height, width

_TRIES = 20  # images tried in the place of one that cannot be read
_TOGETHER = 128  # files held in memory at a time
_SMALL = 64  # pixels a side of images that are cut together: one at a time, calls would take longer than pixels


@dataclass(frozen=True)
class Request:
    """The images one process needs for one micro-batch, or one of several pieces of it."""

    index: Tensor  # (n,) in the training split
    visit: Tensor  # (n,) see epoch_order
    last: Tensor  # (n,) bool, see last_reads; all False where nothing is read in chunks


def joined(pieces: Sequence[Request]) -> Request:
    """The request that the pieces are parts of."""
    return Request(*(torch.cat([getattr(piece, column.name) for piece in pieces]) for column in fields(Request)))


class ViewCrops(Dataset[tuple[Request, list[Tensor], Tensor, BadList]]):
    """The views of the images of a request, each (n, C, S, S) uint8; also which images these are, and the bad ones."""

    def __init__(self, source: Source, views: Views, seed: int) -> None:
        self.source, self.views, self.seed = source, views, seed
        self.sizes = views.sizes(source.image_size)

    def __getitem__(self, request: Request) -> tuple[Request, list[Tensor], Tensor, BadList]:
        positions = self.source.splits["train"][request.index]
        self.source.hold(positions)
        key = rng.mix(self.seed, request.visit, request.index)
        views = [torch.empty(len(key), self.source.channels, size, size, dtype=torch.uint8) for size in self.sizes]
        read = positions.clone()
        bad: BadList = []
        for start in range(0, len(key), _TOGETHER):
            rows = list(range(start, min(start + _TOGETHER, len(key))))
            bad += self.fill(rows, positions, key, views, read)
        self.source.release(positions[request.last])
        return request, views, read, bad

    def fill(self, rows: list[int], positions: Tensor, key: Tensor, views: list[Tensor], read: Tensor) -> BadList:
        """Put the crops of some rows into `views`; an image that cannot be read is replaced by a deterministic other.

        read: gets the position that each row comes from. Returns path and reason of the images that could not be read.
        """
        bad: BadList = []
        for attempt in range(_TRIES + 1):
            opened: dict[int, Opened] = {}
            failed = []
            for row in rows:
                if attempt > 0:
                    read[row] = replacement(self.source, int(positions[row]), attempt)
                try:
                    opened[row] = self.source.open(int(read[row]))
                except BadImage as error:
                    failed.append((row, error))
            boxes, divisors = self.boxes(list(opened.values()), key[list(opened)])
            small: dict[tuple[int, int], dict[int, Drawn]] = defaultdict(dict)
            for number, (row, image) in enumerate(opened.items()):
                try:
                    picture = image.decode(divisors[number])
                except BadImage as error:
                    failed.append((row, error))
                    continue
                if picture.size == image.size and is_small(picture) and resize.library() is not None:
                    small[picture.size][row] = (picture, boxes[number])
                    continue
                for view, crop in enumerate(self.cut(picture, image.size, boxes[number])):
                    views[view][row] = crop
            for drawn in small.values():
                self.cut_together(drawn, views)
            bad += [(error.path, error.reason) for _, error in failed]
            rows = sorted(row for row, _ in failed)
            if not rows:
                return bad
        path, _ = bad[-1]
        raise ConfigError(f"{path} and {_TRIES} images tried in its place cannot be read") from failed[-1][1]

    def boxes(self, images: list[Opened], key: Tensor) -> tuple[list[list[list[int]]], list[int]]:
        """Of each image: top, left, height, width of each view, and the largest divisor that leaves them enough."""
        if not images:
            return [], []
        width, height = torch.tensor([image.size for image in images]).unbind(1)
        boxes = torch.stack([self.views.boxes(view, key, height, width) for view in range(len(self.sizes))], 1)
        if not self.source.scaled_decode:
            return boxes.tolist(), [1] * len(images)
        shrunk = (boxes[:, :, 2:] // torch.tensor(self.sizes).view(1, -1, 1)).flatten(1).amin(1)
        return boxes.tolist(), [max(d for d in DIVISORS if d <= max(1, least)) for least in shrunk.tolist()]

    def cut_together(self, drawn: dict[int, Drawn], views: list[Tensor]) -> None:
        """Put the crops of whole pictures of one size, with their boxes, into the rows of `views`."""
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture, _ in drawn.values()]))
        boxes = torch.tensor([boxes for _, boxes in drawn.values()])
        for number, (into, size, view) in enumerate(zip(views, self.sizes, self.views.views, strict=True)):
            cubic = view.interpolation == "bicubic"
            into[list(drawn)] = resize.resized_bytes(pixels, boxes[:, number], size, cubic=cubic)

    def cut(self, picture: Picture, whole: tuple[int, int], boxes: list[list[int]]) -> list[Tensor]:
        """The crops (C, S, S) uint8 of a picture, the boxes being those of the `whole` (width, height)."""
        kinds = [view.interpolation for view in self.views.views]
        if picture.size != whole:
            assert isinstance(picture, Image.Image)
            scale = max(round(full / part) for full, part in zip(whole, picture.size, strict=True))
            shrunk = [[number / scale for number in box] for box in boxes]
            return [cut_shrunk(picture, *one) for one in zip(shrunk, self.sizes, kinds, strict=True)]
        if isinstance(picture, (Image.Image, Pixels)):
            pixels = torch.from_numpy(np.require(picture, np.uint8, "W")).permute(2, 0, 1)
            return [cut_whole(pixels, *one) for one in zip(boxes, self.sizes, kinds, strict=True)]
        crops = [
            picture.crop((left, top, left + width, top + height)).resize((size, size), RESAMPLE[kind])
            for (top, left, height, width), size, kind in zip(boxes, self.sizes, kinds, strict=True)
        ]
        return [to_uint8([crop])[0] for crop in crops]


def is_small(picture: Picture) -> bool:
    """Whether a picture of plain pixels is better cut together with others."""
    return isinstance(picture, (Image.Image, Pixels)) and max(picture.size) <= _SMALL


def cut_whole(pixels: Tensor, box: Sequence[int], size: int, interpolation: str) -> Tensor:
    """A box (top, left, height, width) of (C, H, W) uint8 at (size, size), antialiased.

    It is what Pillow makes of it up to a rounding of one in 255, in less than half of the time: torch has vector code
    for bytes whose channels lie side by side.
    """
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]
    return interpolate(part, size=(size, size), mode=interpolation, antialias=True)[0]


def cut_shrunk(picture: Image.Image, box: Sequence[float], size: int, interpolation: str) -> Tensor:
    """A box of fractions of pixels as (C, size, size) uint8; pixels that it does not touch play no part."""
    top, left, height, width = box
    x, y = math.floor(left), math.floor(top)
    right, bottom = min(left + width, picture.width), min(top + height, picture.height)
    part = picture.crop((x, y, math.ceil(right), math.ceil(bottom)))
    inside = (left - x, top - y, right - x, bottom - y)
    return to_uint8([part.resize((size, size), RESAMPLE[interpolation], box=inside)])[0]


class PlainCrops(Dataset[tuple[Tensor, Tensor]]):
    """Images for evaluation, and which of them could be read."""

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
    """Shorter side to size * 8 / 7, then the middle size x size; an image of that size stays as it is."""
    if image.size == (size, size):
        return image
    scale = round(size * 8 / 7) / min(image.size)
    wide = image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))), RESAMPLE["bilinear"]
    )
    left, top = (wide.width - size) // 2, (wide.height - size) // 2
    return wide.crop((left, top, left + size, top + size))


def to_uint8(images: Sequence[Picture]) -> Tensor:
    """Images of one size -> (n, C, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
