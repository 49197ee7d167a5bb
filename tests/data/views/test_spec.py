from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sslcli.data.rng import mix
from sslcli.data.views import augment
from sslcli.data.views.spec import View
from sslcli.data.views.views import ScaledViews, Views

PRESETS = sorted((Path(__file__).parents[3] / "conf" / "views").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=[path.stem for path in PRESETS])
def test_every_preset_loads_and_draws(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# ")
    kind = {"sslcli.data.views.views.Views": Views, "sslcli.data.views.views.ScaledViews": ScaledViews}[
        config.pop("_target_")
    ]
    assert set(config) - {"strength"} == {"views", "normalize", "color_space"}
    views = kind(**config)
    assert len(views.describe()) == len(config["views"])
    key, sides = mix(0, 0, torch.arange(4)), torch.full((4,), 48)
    images = torch.randint(256, (4, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for view, size in enumerate(views.sizes(32)):
        boxes = views.boxes(view, key, sides, sides)
        crops = augment.resized_crop(images, boxes, size, interpolation=views.views[view].interpolation)
        got = views.color(view, key, crops, mean=[0.5] * 3, std=[0.25] * 3)
        assert got.shape == (4, 3, size, size)
        assert got.isfinite().all()


def _fields(name: str) -> list[View]:
    config = yaml.safe_load(next(path for path in PRESETS if path.stem == name).read_text())
    return [View(**entry) for entry in config["views"]]


def test_presets_have_the_published_numbers() -> None:
    # crop, jitter, its probability, blur probabilities, solarize probabilities; views of each entry
    simclr, mild = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1)
    byol = (0.4, 0.4, 0.2, 0.1)
    table: dict[str, list[tuple[Any, ...]]] = {
        "instdisc": [((0.2, 1), (0.4, 0.4, 0.4, 0.4), 1, 0, 0, 1)],
        "moco_v1": [((0.2, 1), (0.4, 0.4, 0.4, 0.4), 1, 0, 0, 2)],
        "moco_v2": [((0.2, 1), mild, 0.8, 0.5, 0, 2)],
        "simclr": [((0.08, 1), simclr, 0.8, 0.5, 0, 2)],
        "simclr_imagenet": [((0.08, 1), simclr, 0.8, 0.5, 0, 2)],
        "simclr_cifar": [((0.08, 1), mild, 0.8, 0, 0, 2)],
        "byol": [((0.08, 1), byol, 0.8, 1, 0, 1), ((0.08, 1), byol, 0.8, 0.1, 0.2, 1)],
        "byol_imagenet": [((0.08, 1), byol, 0.8, 1, 0, 1), ((0.08, 1), byol, 0.8, 0.1, 0.2, 1)],
        "byol_cifar": [((0.08, 1), byol, 0.8, 0, 0, 1), ((0.08, 1), byol, 0.8, 0, 0.2, 1)],
        "swav": [((0.14, 1), simclr, 0.8, 0.5, 0, 2), ((0.05, 0.14), simclr, 0.8, 0.5, 0, 6)],
        "dino": [
            ((0.4, 1), byol, 0.8, 1, 0, 1),
            ((0.4, 1), byol, 0.8, 0.1, 0.2, 1),
            ((0.05, 0.4), byol, 0.8, 0.5, 0, 8),
        ],
        "swav_cifar": [((0.14, 1), mild, 0.8, 0, 0, 2), ((0.05, 0.14), mild, 0.8, 0, 0, 4)],
        "dino_cifar": [
            ((0.4, 1), byol, 0.8, 0, 0, 1),
            ((0.4, 1), byol, 0.8, 0, 0.2, 1),
            ((0.05, 0.4), byol, 0.8, 0, 0, 4),
        ],
        "infomin": [((0.2, 1), simclr, 0.8, 0.5, 0, 2)],
        "cifar_symmetric": [((0.08, 1), simclr, 0.8, 0.5, 0, 2)],
        "cifar_symmetric_weak": [((0.08, 1), mild, 0.8, 0.5, 0, 2)],
        "cifar_asymmetric": [((0.08, 1), byol, 0.8, 0, 0, 1), ((0.08, 1), byol, 0.8, 0, 0.2, 1)],
    }
    for name, rows in table.items():
        got = [(v.crop_scale, v.jitter, v.jitter_p, v.blur, v.solarize, v.count) for v in _fields(name)]
        assert got == rows, name
        assert all(view.grayscale == 0.2 and view.flip == 0.5 for view in _fields(name)), name
        assert all(view.grayscale_first == (name in ("instdisc", "moco_v1")) for view in _fields(name)), name
    bicubic = {name for name in table if {view.interpolation for view in _fields(name)} == {"bicubic"}}
    assert bicubic == {"simclr_imagenet", "byol_imagenet", "dino", "dino_cifar"} | {
        n for n in table if n.startswith("cifar_")
    }
    blurred = {name for name in table if any(view.blur_kernel == 13 for view in _fields(name))}
    assert blurred == {"cifar_symmetric", "cifar_symmetric_weak"}  # solo-learn: the whole Gaussian, by PIL
    for suffix, size in (("", 96), ("_stl10", 40), ("_cifar", 16)):
        assert [view.size for view in _fields(f"swav{suffix}")] == [None, size]
        assert [view.size for view in _fields(f"dino{suffix}")] == [None, None, size]
    for name in ("swav", "dino"):
        large, small = _fields(name), _fields(f"{name}_stl10")
        assert [replace(view, size=None) for view in large] == [replace(view, size=None) for view in small]
    (infomin,) = _fields("infomin")
    assert (infomin.rand_augment, infomin.rand_augment_magnitude, infomin.rand_augment_std) == (2, 10, 0.5)
    assert infomin.kernel_size(224) == 23
    assert _fields("mae") == [View(crop_scale=(0.2, 1.0), interpolation="bicubic")]
    assert _fields("ijepa") == [View(crop_scale=(0.3, 1.0), flip=0.0)]


def test_a_strength_multiplies_the_jitter_and_nothing_else() -> None:
    plain = {"count": 2, "jitter": [0.8, 0.8, 0.8, 0.2], "jitter_p": 0.8, "grayscale": 0.1}
    scaled = ScaledViews([plain, {}], strength=0.25)
    want = Views([plain | {"jitter": [0.2, 0.2, 0.2, 0.05]}, {}])
    assert scaled.entries == want.entries
    assert scaled.views == want.views
    assert ScaledViews([plain]).views == Views([plain]).views
    assert not ScaledViews([plain], strength=0).views[0].has_jitter
    assert ScaledViews([plain], strength=2.5).views[0].jitter[3] == 0.5
    for strength in (-1, 2.6, math.nan, "strong"):
        with pytest.raises(ValueError, match=r"strength=.* at least 0 and at most 2\.5, which scales the hue"):
            ScaledViews([plain], strength=strength)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (96, 9), (64, 7), (32, 3), (16, 3)])
def test_blur_kernel_is_about_a_tenth_of_the_side(size: int, taps: int) -> None:
    assert View().kernel_size(size) == taps
    assert View(blur_kernel=11).kernel_size(size) == 11


def test_describe_names_what_happens_and_nothing_else() -> None:
    views = Views(
        [{"count": 2, "jitter": [0.4, 0.4, 0.4, 0.1], "blur": 0.5}, {"size": 96, "crop_scale": None, "flip": 0}]
    )
    first, second = views.describe()
    assert first == "2 x image size, crop 0.2-1, flip p=0.5, jitter (0.4, 0.4, 0.4, 0.1) p=1, blur 0.1-2 p=0.5"
    assert second == "1 x 96, no crop"
    assert views.sizes(32) == [32, 32, 96]


@pytest.mark.parametrize(
    ("field", "value", "constraint"),
    [
        ("count", 0, "an integer of at least 1"),
        ("size", 32.5, "an integer of at least 1"),
        ("crop_scale", [0.0, 1.0], "0 < low <= high <= 1"),
        ("crop_scale", [0.5, 0.2], "0 < low <= high <= 1"),
        ("crop_scale", 0.2, "a pair"),
        ("crop_ratio", [0.0, 1.0], "0 < low <= high"),
        ("interpolation", "nearest", "one of bilinear, bicubic"),
        ("flip", 1.5, r"a number in \[0, 1\]"),
        ("flip", "often", r"a number in \[0, 1\]"),
        ("jitter", [0.4, 0.4, 0.4], "four numbers"),
        ("jitter", [0.4, 0.4, 0.4, 0.6], "hue, the fourth, at most 0.5"),
        ("jitter", [-0.1, 0.4, 0.4, 0.1], "at least 0 each"),
        ("jitter_p", -0.1, r"a number in \[0, 1\]"),
        ("grayscale", math.nan, r"a number in \[0, 1\]"),
        ("grayscale_first", 1, "true or false"),
        ("blur", True, r"a number in \[0, 1\]"),
        ("blur_sigma", [0.0, 2.0], "0 < low <= high"),
        ("blur_kernel", 4, "odd"),
        ("solarize", 2, r"a number in \[0, 1\]"),
        ("solarize_threshold", 128, r"a number in \[0, 1\]"),
    ],
)
def test_a_wrong_value_names_field_value_and_constraint(field: str, value: object, constraint: str) -> None:
    with pytest.raises(ValueError, match=rf"views\[1\]: {field}=.* must be .*{constraint}") as raised:
        Views([{}, {field: value}])
    assert str(value).strip("[]()") in str(raised.value)


def test_wrong_lists_and_keys_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ValueError, match=r"views\[0\] has the unknown key 'gray_scale'\. Did you mean 'grayscale'\? Known"
    ):
        Views([{"gray_scale": 0.2}])
    with pytest.raises(ValueError, match=r"unknown key 'zzz'\. Known keys: count, size, crop_scale"):
        Views([{"zzz": 1}])
    for empty in ([], {"count": 2}, "simclr"):
        with pytest.raises(ValueError, match="it must be a list of at least one view"):
            Views(empty)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"views\[0\] is 3, but it must be a mapping"):
        Views([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="color_space is 'hsv', but it must be one of rgb, lab, ydbdr"):
        Views([{}], color_space="hsv")


def test_bytes_are_refused_with_the_remedy() -> None:
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8: divide by 255"):
        Views([{}]).color(0, mix(0, torch.arange(1)), images, mean=[0.5] * 3, std=[0.25] * 3)
