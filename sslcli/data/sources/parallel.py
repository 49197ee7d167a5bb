"""Datasets with several modalities per image (color, depth, infrared, ...). Each modality has its own folder.

The modalities of an image are cropped and flipped together. Then they are stacked along the channels in the configured
order, so that an image is a single tensor. Color operations change only the modality that is configured as photometric.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sslcli.data.bad_images import BadImage
from sslcli.data.decode import decode
from sslcli.data.image_formats import parse_extensions
from sslcli.data.pixel_format import to_rgb
from sslcli.data.sources.base import DecodedImage
from sslcli.data.sources.files import base_name
from sslcli.data.sources.leaks import check_class_names, check_disjoint
from sslcli.data.sources.listing import Files, Listing
from sslcli.data.sources.records import ProgressCallback, Records
from sslcli.data.sources.scan import FileSearch, LinkedFolders, check_folder
from sslcli.errors import check_keys

INTERPOLATIONS = ("smooth", "nearest")
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One modality: the images in one folder.

    Attributes:
        channels: 1 or 3.
        interpolation: "smooth" uses the interpolation of the views. "nearest" never mixes pixels; use it for depth and
            segmentation maps.
        photometric: whether the color operations of the views change this modality. At most one modality
            can be photometric.
        optional: whether this modality may be missing for some images. A missing modality is filled with the mean of
            each channel, and its value in `Batch.present` is False.
        span: a pair (low, high) of values that are mapped to 0 and 1. Values outside of this range are clipped. Use a
            span only with one channel, e.g. [0, 10000] for a depth in millimeters up to 10 m. None uses 0 and 255 for
            8-bit files, and 0 and 65535 for 16-bit files.

    Raises ValueError if a value is out of range. The message names the field.
    """

    channels: int = 3
    interpolation: str = "smooth"
    photometric: bool = False
    optional: bool = False
    span: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.channels not in _MODES or isinstance(self.channels, bool):
            raise ValueError(f"channels is {self.channels!r}, but it must be 1 or 3")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}, but it must be {' or '.join(INTERPOLATIONS)}")
        for name in ("photometric", "optional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it must be true or false")
        if self.span is not None:
            if self.channels != 1:
                raise ValueError(f"span is {self.span!r}, but only a modality with one channel can have a span")
            if not _are_numbers(self.span) or len(self.span) != 2 or not self.span[0] < self.span[1]:
                raise ValueError(f"span is {self.span!r}, but it must be two numbers, the lower one first")

    def convert(self, image: Image.Image) -> Image.Image:
        """Convert a decoded file to 8 bits per channel."""
        if self.span is None:
            return to_rgb(image, "full").convert(_MODES[self.channels])
        low, high = self.span
        gray = image if image.mode in ("I", "F") or image.mode.startswith("I;") else image.convert("L")
        scaled = (np.nan_to_num(np.asarray(gray, np.float64)) - low) / (high - low)
        return Image.fromarray(np.rint(scaled.clip(0, 1) * 255).astype(np.uint8))

    def blank(self, size: tuple[int, int], mean: Sequence[float]) -> Image.Image:
        """Return an image in which every pixel is `mean`. After normalization, the pixels are about 0."""
        color = tuple(round(255 * min(max(value, 0.0), 1.0)) for value in mean)
        return Image.new(_MODES[self.channels], size, color if self.channels > 1 else color[0])


@dataclass(frozen=True)
class Layers:
    """The modalities of an image, with the interface of a PIL image. All modalities have the same size."""

    layers: list[Image.Image]  # one image per modality
    nearest: list[bool]  # whether each modality is resized with nearest-neighbor interpolation

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.layers[0].size

    @property
    def width(self) -> int:
        return self.layers[0].width

    @property
    def height(self) -> int:
        return self.layers[0].height

    def crop(self, box: tuple[int, int, int, int]) -> Layers:
        """Crop the same box from all modalities."""
        return Layers([layer.crop(box) for layer in self.layers], self.nearest)

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Layers:
        """Resize all modalities to `size`, width and height in pixels.

        If the attribute `nearest` is True for a modality, nearest-neighbor interpolation is used instead of `resample`.
        """
        filters = [Image.Resampling.NEAREST if nearest else resample for nearest in self.nearest]
        layers = [layer.resize(size, filter) for layer, filter in zip(self.layers, filters, strict=True)]
        return Layers(layers, self.nearest)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Return an array (H, W, C) with the channels of all modalities in order."""
        shape = (self.height, self.width, -1)
        stacked = np.concatenate([np.asarray(layer).reshape(shape) for layer in self.layers], 2)
        return stacked if dtype is None else stacked.astype(dtype)


class Parallel(Files):
    """Class folders of several modalities: `root/<modality>/<class>/<stem>.<ext>`.

    The files with the same class and stem (file name without extension) are the modalities of one image.

    Args:
        root: the folder that contains one folder per modality.
        modalities: mapping from the folder name of each modality to the fields of `Modality`. Channels are stacked in
            this order.
        test: the folder of the official test split, with the same layout as `root`; None = no test split.
        extensions, linked_folders: as for `Folder`.
        common: the arguments of `Source`. `mean` and `std` have one number per channel of all modalities, in order.

    The modalities of an image must have the same aspect ratio. All modalities are resized to the size of the first
    modality that is not missing.

    Attributes:
        present: (number of images, number of modalities) bool, True if the image has a file of the modality.
        modality_channels: the channels of each modality.

    Raises ValueError if a folder or file is missing, or a modality is invalid.
    """

    present: torch.Tensor

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        modalities: Mapping[str, Mapping[str, Any]],
        test: str | os.PathLike[str] | None = None,
        extensions: Sequence[str] | None = None,
        linked_folders: LinkedFolders = "once",
        **common: Any,
    ) -> None:
        self.search = partial(FileSearch, extensions=parse_extensions(extensions), linked_folders=linked_folders)
        self.modalities = parse(modalities)
        modality_list = list(self.modalities.values())
        ends = list(accumulate(modality.channels for modality in modality_list))
        self.channels = ends[-1]
        self.modality_channels = [
            slice(end - modality.channels, end) for modality, end in zip(modality_list, ends, strict=True)
        ]
        photometric_channels = [
            channels
            for modality, channels in zip(modality_list, self.modality_channels, strict=True)
            if modality.photometric
        ]
        self.photometric = photometric_channels[0] if photometric_channels else slice(0, 0)
        super().__init__(**common)
        root = os.path.expanduser(root)
        found = [self.match(root, key="dataset.root")]
        if test is not None:
            test = os.path.expanduser(test)
            found.append(self.match(test, key="dataset.test"))
            # The test folder may be inside of `root`, beside the folders of the modalities.
            for name in self.modalities:
                check_disjoint([os.path.join(root, name)], os.path.join(test, name))
        classes = sorted({name.partition("/")[0] for name in found[0]})
        for name in self.modalities:
            check_class_names(classes, os.path.join(root, name))
        pool, test_files = Listing(), Listing()
        for number, (names, listing) in enumerate(zip(found, (pool, test_files), strict=False)):
            for name in sorted(names):
                class_name = name.partition("/")[0]
                if class_name not in classes:
                    raise ValueError(
                        f"{test} has the class folder {class_name!r}, which {root} does not have: remove it"
                    )
                listing.add([name], label=classes.index(class_name), root=number)
        roots = [root, *([] if test is None else [test])]
        self.fill(pool, test_files, name=base_name([root]), roots=roots, classes=classes)
        rows = [found[0][name] for name in pool.names] + [found[-1][name] for name in test_files.names]
        self.extensions = sorted({extension for row in rows for extension in row if extension is not None})
        number_of = {extension: number for number, extension in enumerate(self.extensions)} | {None: -1}
        self._extension = np.array([[number_of[extension] for extension in row] for row in rows], np.int16)
        self.present = torch.from_numpy(self._extension >= 0)
        self._file_positions = np.argwhere(self._extension >= 0)  # position and modality of each file

    def match(self, root: str, *, key: str) -> dict[str, list[str | None]]:
        """Match the files of all modalities. Return a mapping from `<class>/<stem>` to one file extension per modality.

        The extension of a missing file is None. `key` is the configuration key of `root`, for messages.

        Raises ValueError if a folder or file is missing, or a modality has two files with the same class and stem.
        """
        check_folder(root, key=key)
        found: dict[str, list[str | None]] = {}
        for number, name in enumerate(self.modalities):
            check_folder(os.path.join(root, name), key=f"{key}/{name} (a modality)")
            for files in self.search(os.path.join(root, name)).classes().values():
                for file in files:
                    stem, extension = os.path.splitext(file)
                    row = found.setdefault(stem, [None] * len(self.modalities))
                    if row[number] is not None:
                        raise ValueError(
                            f"{os.path.join(root, name)} has {stem}{row[number]} and {file}: "
                            "keep one file per class and stem, or select the files with dataset.extensions"
                        )
                    row[number] = extension
        for number, (name, modality) in enumerate(self.modalities.items()):
            missing = [stem for stem, row in found.items() if row[number] is None]
            if missing and not modality.optional:
                raise ValueError(
                    f"{os.path.join(root, name)} lacks {len(missing)} of {len(found)} images, such as "
                    f"{min(missing)}: add them, or set dataset.modalities.{name}.optional=true"
                )
        return found

    def path(self, position: int) -> str:
        """Return the path of the image at `position`: the file of the first modality that is not missing."""
        return self.path_of(position, int(self.present[position].int().argmax()))

    def path_of(self, position: int, modality: int) -> str:
        """Return the path of the file of modality number `modality`. The modality must not be missing."""
        name, extension = list(self.modalities)[modality], self.extensions[self._extension[position, modality]]
        return os.path.join(self.roots[self._root_of[position]], name, self.relative(position) + extension)

    def open(self, position: int) -> DecodedImage:
        """Open and decode all modalities of the image with index `position`.

        They are decoded at full size, because not all formats support decoding at a reduced size.
        """
        return DecodedImage(self.read(position))

    def read(self, position: int) -> Layers:
        """Return all modalities at `position`.

        Raises BadImage if a file cannot be read, or if the aspect ratios of the modalities differ.
        """
        layers: list[Image.Image | None] = []
        for number, modality in enumerate(self.modalities.values()):
            layer = None
            if self.present[position, number]:
                layer = decode(self.path_of(position, number), convert=modality.convert)
            layers.append(layer)
        size = next(layer.size for layer in layers if layer is not None)
        resized = [self.fit_to_size(position, number, layer, size) for number, layer in enumerate(layers)]
        return Layers(resized, self.nearest)

    def fit_to_size(self, position: int, number: int, layer: Image.Image | None, size: tuple[int, int]) -> Image.Image:
        """Return `layer`, the image of modality `number`, resized to `size`. If `layer` is None, return a blank image.

        `position` is the index of the image in the dataset.

        Raises BadImage if the aspect ratio of `layer` differs from the aspect ratio of `size`.
        """
        modality = list(self.modalities.values())[number]
        if layer is None:
            return modality.blank(size, self.mean[self.modality_channels[number]])
        if layer.size == size:
            return layer
        # Image sizes are rounded to pixels, so a difference of half a pixel per side is allowed.
        if abs(layer.width * size[1] - layer.height * size[0]) > max(size) + max(layer.size):
            raise BadImage(
                self.path_of(position, number),
                f"its {layer.width} x {layer.height} pixels differ in aspect ratio from the {size[0]} x {size[1]} of "
                f"{self.path(position)}",
            )
        return layer.resize(size, Image.Resampling.NEAREST if self.nearest[number] else Image.Resampling.BILINEAR)

    @property
    def nearest(self) -> list[bool]:
        """Whether each modality uses nearest-neighbor interpolation."""
        return [modality.interpolation == "nearest" for modality in self.modalities.values()]

    def blank(self, size: int) -> Layers:
        """Return a placeholder of size x size pixels for an evaluation image that cannot be read."""
        pairs = zip(self.modalities.values(), self.modality_channels, strict=True)
        return Layers([modality.blank((size, size), self.mean[channels]) for modality, channels in pairs], self.nearest)

    def _rows(self) -> Iterator[bytes]:
        yield repr(list(self.modalities.items())).encode()
        sizes: NDArray[np.int64] = np.full(self._extension.shape, -2, np.int64)
        sizes[self._extension >= 0], _ = self.status()
        rows: list[list[int]] = sizes.tolist()
        for position, (row, label) in enumerate(zip(rows, self.labels.tolist(), strict=True)):
            yield os.fsencode(self.relative(position)) + f"\0{row}\0{label}".encode()

    @property
    def num_files(self) -> int:
        """Number of files. An image has one file for each modality that is not missing."""
        return len(self._file_positions)

    def file(self, number: int) -> str:
        """Return the path of file `number`.

        The numbers follow the order of the images. The files of one image follow the order of the modalities.
        """
        position, modality = self._file_positions[number].tolist()
        return self.path_of(position, modality)

    def file_names(self) -> Iterator[bytes]:
        """Yield the path of every file relative to its root. With several roots, the root number precedes the path."""
        modalities = list(self.modalities)
        for position, modality in self._file_positions.tolist():
            root = self._root_of[position]
            prefix = f"{root}:" if len(self.roots) > 1 else ""
            extension = self.extensions[self._extension[position, modality]]
            yield os.fsencode(f"{prefix}{modalities[modality]}/{self.relative(position)}{extension}")

    def file_labels(self) -> NDArray[np.int64]:
        """Return a hash of the class name of every file; 0 = no label."""
        labels: NDArray[np.int64] = super().file_labels()[self._file_positions[:, 0]]
        return labels

    def records(self, *, contents: bool = False, on_progress: ProgressCallback | None = None) -> Records:
        """Return one record per file, ordered by image, then by modality."""
        return replace(super().records(contents=contents, on_progress=on_progress), unit="files")


def parse(modalities: Mapping[str, Mapping[str, Any]]) -> dict[str, Modality]:
    """Convert the setting `dataset.modalities` to `Modality` objects, as name -> modality.

    Raises ValueError if there is no modality, or if a modality is invalid.
    """
    if not isinstance(modalities, Mapping) or not modalities:
        raise ValueError(f"dataset.modalities is {modalities!r}, but it must have at least one folder of images")
    known = [field.name for field in fields(Modality)]
    parsed: dict[str, Modality] = {}
    for name, node in modalities.items():
        where = f"dataset.modalities.{name}"
        if not isinstance(node, Mapping):
            raise ValueError(f"{where} is {node!r}, but it must be a mapping of {', '.join(known)}")
        check_keys(where, node, known)
        try:
            parsed[str(name)] = Modality(**{str(key): value for key, value in node.items()})
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
    if sum(modality.photometric for modality in parsed.values()) > 1:
        raise ValueError("dataset.modalities has several photometric modalities, but only one can be photometric")
    if all(modality.optional for modality in parsed.values()) and len(parsed) == 1:
        raise ValueError(f"dataset.modalities.{next(iter(parsed))} is the only modality, so it cannot be optional")
    return parsed


def _are_numbers(values: object) -> bool:
    return isinstance(values, Sequence) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
