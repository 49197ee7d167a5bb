"""Crops of the data workers, compared with crops of fully decoded images by Pillow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sslcli.data import rng
from sslcli.data.crops import RESAMPLE, PlainCrops, Request, ViewCrops, center_crop
from sslcli.data.pixels import Pixels
from sslcli.data.sources.base import DecodedImage, Source
from sslcli.data.sources.files import Flat
from sslcli.data.sources.shapes import Nuisances, draw
from sslcli.data.views.views import Views

SEED, COUNT = 3, 12


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of 12 drawn scenes with grain, of sizes that are no multiple of 8."""
    root = tmp_path_factory.mktemp("photos")
    images, _ = draw(torch.arange(COUNT), seed=0, size=48, nuisances=Nuisances())
    generator = np.random.default_rng(0)
    for number, image in enumerate(images):
        size = (301 + 7 * number, 411 - 9 * number)
        large = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
        grainy = np.asarray(large, float) + generator.normal(0, 6, (size[1], size[0], 3))
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(root / f"{number:02d}.jpg", quality=90)
    return root


def source(root: Path, **options: Any) -> Flat:
    return Flat(root=str(root), **({"image_size": 224, "val_fraction": 0.0} | options))


def request(index: Tensor) -> Request:
    return Request(index, torch.zeros_like(index), torch.zeros(len(index), dtype=torch.bool))


def crops(photo_set: Flat, views: list[Mapping[str, Any]], index: Tensor | None = None) -> list[Tensor]:
    _, found, read, bad = ViewCrops(photo_set, Views(views), SEED)[
        request(torch.arange(COUNT) if index is None else index)
    ]
    assert not bad
    assert len(read) == len(found[0])
    return found


def slow(photo_set: Flat, views: list[Mapping[str, Any]]) -> list[Tensor]:
    """The same crops, computed one image at a time by Pillow."""
    kinds = Views(views)
    found: list[list[Tensor]] = [[] for _ in range(kinds.num_views)]
    for index in range(COUNT):
        image = photo_set.read(int(photo_set.splits["train"][index]))
        key = rng.mix(SEED, 0, torch.tensor([index]))
        for view, size in enumerate(kinds.sizes(photo_set.image_size)):
            box = kinds.boxes(view, key, torch.tensor([image.height]), torch.tensor([image.width]))
            top, left, height, width = box[0].tolist()
            part = image.crop((left, top, left + width, top + height))
            part = part.resize((size, size), RESAMPLE[kinds.views[view].interpolation])
            found[view].append(torch.from_numpy(np.array(part)).permute(2, 0, 1))
    return [torch.stack(view) for view in found]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [48, 224])
def test_crops_of_whole_images_are_those_of_pillow(photos: Path, interpolation: str, size: int) -> None:
    photo_set = source(photos, image_size=size, scaled_decode=False)
    views = [{"count": 2, "crop_scale": [0.08, 1.0], "interpolation": interpolation}]
    for one, other in zip(crops(photo_set, views), slow(photo_set, views), strict=True):
        difference = (one.int() - other.int()).abs()
        # Rounded between the passes, which torch may take in the other order: then bicubic overshoots at other pixels.
        assert difference.max() <= (1 if interpolation == "bilinear" else 12)
        assert difference.float().mean() < 0.3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("views", [[{"count": 2}], [{"crop_scale": None}, {"size": 24, "crop_scale": [0.3, 0.5]}]])
def test_scaled_decoding_changes_little(photos: Path, views: list[dict[str, Any]], interpolation: str) -> None:
    views = [view | {"interpolation": interpolation} for view in views]
    photo_set = source(photos, image_size=40)
    found, wanted = crops(photo_set, views), slow(photo_set, views)
    for one, other in zip(found, wanted, strict=True):
        assert not torch.equal(one, other)
        # Of 255. A box that is off by half a pixel of the smaller image gives 1.5 and more.
        assert (one.int() - other.int()).abs().float().mean() < 0.8


@pytest.mark.parametrize("size", [16, 40, 90, 300])
def test_no_crop_has_fewer_pixels_than_its_result_because_of_scaled_decoding(photos: Path, size: int) -> None:
    photo_set = source(photos)
    views = Views([{"count": 2, "size": size}, {"size": 8, "crop_scale": [0.05, 0.2]}])
    worker = ViewCrops(photo_set, views, SEED)
    index = torch.arange(COUNT)
    opened = [photo_set.open(int(position)) for position in photo_set.splits["train"]]
    boxes, divisors = worker.boxes(opened, rng.mix(SEED, 0, index))
    for image_boxes, divisor in zip(boxes, divisors, strict=True):
        ratios = [side / out for (*_, h, w), out in zip(image_boxes, (size, size, 8), strict=True) for side in (h, w)]
        assert divisor == 1 or min(ratios) >= divisor
        assert divisor == 8 or min(ratios) < 2 * divisor
    assert (max(divisors) > 1) == (size < 300)


def test_crops_do_not_depend_on_what_else_is_asked_for(photos: Path) -> None:
    photo_set, views = source(photos, image_size=40), [{"count": 2}, {"size": 20, "crop_scale": [0.05, 0.3]}]
    index = torch.tensor([7, 2, 11])
    for whole, few in zip(crops(photo_set, views), crops(photo_set, views, index), strict=True):
        assert torch.equal(whole[index], few)


def test_a_wrong_option_is_named(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.scaled_decode is 'no'"):
        source(photos, scaled_decode="no")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(300, 200), (33, 500), (64, 1), (1, 64), (7, 7), (224, 224), (9, 500)])
@pytest.mark.parametrize("side", [32, 224])
def test_center_crops_of_ordinary_images_are_crops_of_the_whole_resized_image(size: tuple[int, int], side: int) -> None:
    image = noise(*size)
    scale = round(side * 8 / 7) / min(size)
    whole = image.resize([max(side, round(length * scale)) for length in size], Image.Resampling.BILINEAR)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    wanted = image if size == (side, side) else whole.crop((left, top, left + side, top + side))
    assert np.array_equal(center_crop(image, side), wanted)


@pytest.mark.parametrize("size", [(16_000, 1), (1, 16_000), (16_001, 2), (65, 1)])
def test_center_crops_of_long_images_show_their_center(size: tuple[int, int]) -> None:
    image = noise(*size)
    scale = 256 / min(size)
    # The image around its center, which is resized alone to the size that it has in the whole resized image.
    box = [length / 2 + sign * min(length, 20 * min(size)) / 2 for sign in (-1, 1) for length in size]
    part = [round((high - low) * scale) for low, high in zip(box[:2], box[2:], strict=True)]
    whole = image.resize(part, Image.Resampling.BILINEAR, box=box)
    left, top = (whole.width - 224) // 2, (whole.height - 224) // 2
    wanted = np.asarray(whole.crop((left, top, left + 224, top + 224)), int)
    assert np.abs(np.asarray(center_crop(image, 224), int) - wanted).max() <= 1


def test_long_images_need_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(16_000, 1).save(tmp_path / "0.png")
    noise(1, 16_000).save(tmp_path / "1.png")
    sizes = []
    resize = Image.Image.resize

    def counted(image: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        sizes.append(size[0] * size[1])
        assert sizes[-1] < 10**7
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    long = source(tmp_path)
    images, readable = PlainCrops(long)[torch.arange(2)]
    assert readable.all()
    assert images.shape == (2, 3, 224, 224)
    assert len(sizes) == 2
    for views in ([{"count": 2}], [{"crop_scale": None}, {"size": 24}]):
        assert [len(view) for view in crops(long, views, torch.arange(2))] == [2, 2]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 33), (301, 190)])
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 12])
def test_crops_of_any_number_of_channels_are_those_of_each_channel(
    channels: int, size: tuple[int, int], interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small images are cropped together, large ones one by one, and JPEGs may be decoded at a smaller size."""
    count, (width, height) = 3, size
    values = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)
    views = Views([{"count": 2, "interpolation": interpolation}])

    class Bands(Source):
        def __init__(self, selected: slice) -> None:
            self.values = values[..., selected]
            self.channels = self.values.shape[3]
            many = self.channels
            super().__init__(image_size=24, val_fraction=0.0, mean=[0.5] * many, std=[0.5] * many)
            self.name, self.classes, self.labels = "bands", [], torch.full((count,), -1)
            self.split(torch.arange(count), labeled=torch.zeros(count, dtype=torch.bool))

        def open(self, position: int) -> DecodedImage:
            return DecodedImage(Pixels(self.values[position]))

    def found(selected: slice) -> list[Tensor]:
        images, readable = PlainCrops(Bands(selected))[torch.arange(count)]
        assert readable.all()
        return [*ViewCrops(Bands(selected), views, SEED)[request(torch.arange(count))][1], images]

    whole = found(slice(None))
    for channel in range(channels):
        # The two ways to crop round differently.
        for one, other in zip(whole, found(slice(channel, channel + 1)), strict=True):
            assert (one[:, channel : channel + 1].int() - other.int()).abs().max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_gray_crops_of_scaled_jpegs_are_the_luma_of_the_color_crops(photos: Path, interpolation: str) -> None:
    views = [{"count": 2, "interpolation": interpolation}, {"size": 24, "crop_scale": [0.3, 0.5]}]
    for size in (40, 224):
        gray = crops(source(photos, image_size=size, channels=1), views)
        for one, other in zip(gray, crops(source(photos, image_size=size), views), strict=True):
            assert one.shape == (COUNT, 1, *other.shape[2:])
            red, green, blue = other.float().unbind(1)
            luma = 0.299 * red + 0.587 * green + 0.114 * blue
            assert (one[:, 0] - luma).abs().mean() < 0.6
