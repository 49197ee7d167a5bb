from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from sslcli.data.rng import mix, uniform
from sslcli.data.views import rand_augment as ra
from sslcli.data.views.spec import View
from sslcli.data.views.views import Views

FILL = (0.25, 0.5, 0.75)
BYTES = tuple(round(255 * value) for value in FILL)
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
CONSTANTS = {"mean": FILL, "std": (0.2, 0.2, 0.2)}


def _images(height: int = 40, width: int = 40) -> Tensor:
    """Bytes: smooth images, noise, a dark one, a flat one, one of two values and a gray one: (6, 3, H, W) uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 6, 6, generator=generator)
    images = reference.resize(coarse, [height, width], antialias=True)
    images[1] = torch.rand(3, height, width, generator=generator)
    images[2] = images[2] * 0.3 + 0.1
    images[3] = 0.4
    images[4] = images[4].round()
    images[5] = images[5, :1]
    return (images * 255).round().byte()


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _tensor(image: Image.Image) -> Tensor:
    return reference.pil_to_tensor(image).float() / 255


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    add = int(level / 10 * 110)
    return image.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)


def _black(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size)


def _factor(level: float) -> float:
    return level / 10 * 1.8 + 0.1


# What PyContrast does with Pillow, level in [0, 10].
COLORS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "invert": lambda image, level: ImageOps.invert(image),
    # Pillow once took 0 bits, which leave nothing of an image, and refuses them now.
    "posterize": lambda image, level: ImageOps.posterize(image, int(level / 10 * 4)) if level >= 2.5 else _black(image),
    "solarize": lambda image, level: ImageOps.solarize(image, int(level / 10 * 256)),
    "solarize_add": _solarize_add,
    "color": lambda image, level: ImageEnhance.Color(image).enhance(_factor(level)),
    "contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(_factor(level)),
    "brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(_factor(level)),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(_factor(level)),
}


def _moved(name: str, image: Image.Image, level: float, resample: Image.Resampling) -> Image.Image:
    fraction, (width, height) = level / 10, image.size
    if name == "rotate":
        return image.rotate(fraction * 30, resample=resample, fillcolor=BYTES)
    matrix = {
        "shear_x": (1, fraction * 0.3, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, fraction * 0.3, 1, 0),
        "translate_x": (1, 0, fraction * 0.45 * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, fraction * 0.45 * height),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=BYTES)


def _operate(name: str, images: Tensor, level: float, *, bicubic: bool = False) -> Tensor:
    levels = torch.full((len(images),), level)
    return ra.apply_operation(
        name, images, levels, bicubic=torch.full((len(images),), bicubic), fill=torch.tensor(FILL)
    )


def test_there_are_the_fifteen_operations_of_pycontrast() -> None:
    assert len(ra.OPERATIONS) == 15
    assert sorted(ra.OPERATIONS) == sorted([*COLORS, *GEOMETRIC])


@pytest.mark.parametrize("name", COLORS)
@pytest.mark.parametrize("level", [0.0, 3.3, 5.0, 7.7, 10.0])
def test_color_operations_equal_pil_within_rounding(name: str, level: float) -> None:
    images = _images(40, 34)
    got = _operate(name, images / 255, level)
    want = torch.stack([_tensor(COLORS[name](_pil(image), level)) for image in images])
    torch.testing.assert_close(got, want, rtol=0, atol=2 / 255)
    assert (got - want).abs().mean() < 0.6 / 255


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("level", [-10.0, -3.1, 0.0, 5.3, 10.0])
def test_geometric_operations_equal_pil_within_rounding(name: str, bicubic: bool, level: float) -> None:
    images = _images(40, 34)
    got = _operate(name, images / 255, level, bicubic=bicubic)
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    want = torch.stack([_tensor(_moved(name, _pil(image), level, resample)) for image in images])
    torch.testing.assert_close(got, want, rtol=0, atol=2 / 255)
    assert level == 0 or (got - images / 255).abs().max() > 0.1


def test_operations_equal_torchvision_where_it_has_them() -> None:
    images = _images() / 255
    torch.testing.assert_close(_operate("auto_contrast", images, 10.0), reference.autocontrast(images))
    torch.testing.assert_close(_operate("equalize", images, 10.0), reference.equalize(_images()) / 255)
    torch.testing.assert_close(_operate("invert", images, 10.0), reference.invert(images))
    want = reference.posterize(_images(), 2) / 255
    torch.testing.assert_close(_operate("posterize", images, 5.0), want)
    for level in (0.0, 4.0, 10.0):
        want = reference.adjust_sharpness(images, _factor(level))
        torch.testing.assert_close(_operate("sharpness", images, level), want, rtol=0, atol=1e-5)
        want = reference.adjust_saturation(images, _factor(level))
        torch.testing.assert_close(_operate("color", images, level), want, rtol=0, atol=1e-5)


def _draws(count: int, layers: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(layers, ra.STREAMS, count, generator=torch.Generator().manual_seed(seed))


def _augment(images: Tensor, draws: Tensor, *, magnitude: float = 10.0, std: float = 0.5, p: float = 0.5) -> Tensor:
    return ra.rand_augment(
        images, draws, magnitude=magnitude, std=std, probability=p, fill=torch.tensor(FILL[: images.shape[1]])
    )


def test_no_operation_is_the_identity_and_magnitude_0_is_not() -> None:
    images = torch.rand(32, 3, 16, 16)
    assert torch.equal(_augment(images, _draws(32, layers=0)), images)
    assert torch.equal(_augment(images, _draws(32), p=0.0), images)
    assert not torch.equal(_augment(images, _draws(32), magnitude=0.0, std=0.0, p=1.0), images)
    plain, none = (
        Views([View(jitter=(0.4, 0.4, 0.4, 0.1), blur=0.5)]),
        View(jitter=(0.4, 0.4, 0.4, 0.1), blur=0.5, rand_augment=0, rand_augment_magnitude=3.0),
    )
    key = mix(0, torch.arange(32))
    assert torch.equal(plain.color(0, key, images, **CONSTANTS), Views([none]).color(0, key, images, **CONSTANTS))


def test_a_batch_is_each_image_with_the_operations_drawn_for_it() -> None:
    images, draws = torch.rand(400, 3, 12, 12, generator=torch.Generator().manual_seed(1)), _draws(400)
    before = images.clone()
    got = _augment(images, draws)
    assert torch.equal(images, before)
    for number in range(400):
        want = images[number : number + 1]
        for which, happens, radius, angle, sign, smooth in draws[:, :, number]:
            if happens >= 0.5:
                continue
            name = ra.OPERATIONS[int(which * 15)]
            normal = math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)
            level = min(10.0, max(0.0, 10 + 0.5 * normal))
            signed = -level if name in GEOMETRIC and sign < 0.5 else level
            want = _operate(name, want, signed, bicubic=bool(smooth < 0.5))
        # Levels are rounded down to whole thresholds and bits, which 1e-7 may tip: none of the 400 is so close.
        torch.testing.assert_close(got[number : number + 1], want, rtol=0, atol=1e-4)


def test_operations_levels_signs_and_filters_are_drawn_as_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, Tensor]] = []

    def recolor(name: str, images: Tensor, level: Tensor) -> Tensor:
        drawn.append((name, level))
        return images

    def affine(images: Tensor, matrix: Tensor, bicubic: Tensor, fill: Tensor) -> Tensor:
        angle = torch.rad2deg(torch.atan2(matrix[:, 3], matrix[:, 0]))
        # Of those that neither turn nor shear.
        shift = (matrix[:, 2] + matrix[:, 5]) * ((matrix[:, 1] == 0) & (matrix[:, 3] == 0))
        drawn.append(("turned", angle))
        drawn.append(("bicubic", bicubic.float()))
        drawn.append(("shift", shift))
        return images

    monkeypatch.setattr(ra, "_recolor", recolor)
    monkeypatch.setattr(ra, "affine", affine)
    count = 60_000
    _augment(torch.zeros(count, 1, 4, 4), _draws(count, layers=1), magnitude=6.0, std=0.5)
    by_name = dict(drawn)
    for name in COLORS:
        assert abs(len(by_name[name]) / count - 0.5 / 15) < 0.003, name
        assert abs(by_name[name].mean() - 6) < 0.05
        assert abs(by_name[name].std() - 0.5) < 0.05
    assert abs(len(by_name["turned"]) / count - 0.5 * 5 / 15) < 0.006
    assert abs(by_name["bicubic"].mean() - 0.5) < 0.02
    for values in (by_name["turned"], by_name["shift"]):
        assert (values > 0.1).float().mean() > 0.15
        assert abs((values > 0.1).float().mean() - (values < -0.1).float().mean()) < 0.02
    drawn.clear()
    _augment(torch.zeros(count, 1, 4, 4), _draws(count, layers=1), magnitude=10.0, std=0.5)
    levels = dict(drawn)["posterize"]
    assert levels.max() == 10
    assert abs((levels == 10).float().mean() - 0.5) < 0.04


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_stay_in_range_for_any_channels_and_type(channels: int, dtype: torch.dtype) -> None:
    images = torch.rand(300, channels, 13, 9).to(dtype)
    got = _augment(images, _draws(300, layers=4), magnitude=8.0, std=2.0, p=1.0)
    assert got.dtype == dtype
    assert got.shape == images.shape
    assert got.min() >= 0
    assert got.max() <= 1


def test_images_too_small_to_smooth_stay() -> None:
    images = torch.rand(3, 3, 2, 5)
    assert torch.equal(_operate("sharpness", images, 10.0), images)


@pytest.mark.parametrize("part", [1, 8])
def test_a_view_is_the_same_in_any_batch_and_another_in_each_view(part: int) -> None:
    spec = View(count=2, rand_augment=3, rand_augment_p=1.0, rand_augment_magnitude=7.0, grayscale=0.2)
    views, images, key = Views([spec]), torch.rand(64, 3, 16, 16), mix(3, torch.arange(64))
    whole = views.color(0, key, images, **CONSTANTS)
    pieces = [slice(start, start + part) for start in range(0, 64, part)]
    split = torch.cat([views.color(0, key[p], images[p], **CONSTANTS) for p in pieces])
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-5)
    assert ((views.color(1, key, images, **CONSTANTS) - whole).abs().amax((1, 2, 3)) > 0.1).float().mean() > 0.8


def test_gray_comes_after_rand_augment_and_the_fill_is_the_mean_of_the_set() -> None:
    images, key = torch.rand(500, 3, 16, 16), mix(3, torch.arange(500))
    gray = Views([View(rand_augment=2, rand_augment_p=1.0, grayscale=1.0)], normalize=False)
    got = gray.color(0, key, images, **CONSTANTS)
    torch.testing.assert_close(got[:, 0], got[:, 1])  # a fill in color would show if gray came first
    color = Views([View(rand_augment=1, rand_augment_p=1.0)], normalize=True)
    got = color.color(0, key, images, **CONSTANTS)
    filled = (got.abs().amax(1) < 1e-5).flatten(1).any(1).float().mean()
    assert abs(filled - 5 / 15) < 0.08


def test_blur_comes_before_rand_augment() -> None:
    images, key = torch.rand(300, 3, 16, 16), mix(5, torch.arange(300))
    spec = {"flip": 0.0, "blur": 1.0, "blur_sigma": (1.0, 1.0)}
    blurred = Views([View(**spec)], normalize=False).color(0, key, images, **CONSTANTS)
    got = Views([View(**spec, rand_augment=2)], normalize=False).color(0, key, images, **CONSTANTS)
    draws = uniform(mix(key, 0).unsqueeze(0), torch.arange(128, 140).unsqueeze(1)).view(2, 6, -1)
    torch.testing.assert_close(got, _augment(blurred, draws), rtol=0, atol=1e-6)


def test_only_some_channels_are_refused() -> None:
    images = torch.rand(2, 4, 8, 8)
    with pytest.raises(ValueError, match="rand_augment of a view moves pixels"):
        Views([View(rand_augment=1)]).color(
            0, mix(0, torch.arange(2)), images, mean=[0.5] * 4, std=[0.5] * 4, photometric=slice(0, 3)
        )


@pytest.mark.parametrize(
    ("field", "value", "constraint"),
    [
        ("rand_augment", -1, "an integer of at least 0"),
        ("rand_augment_magnitude", 11, "at least 0 and at most 10"),
        ("rand_augment_std", -0.5, "at least 0"),
        ("rand_augment_p", 1.5, r"in \[0, 1\]"),
    ],
)
def test_wrong_values_are_refused(field: str, value: float, constraint: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}={value} of a view must be .*{constraint}"):
        View(**{field: value})


def test_a_view_says_what_it_draws() -> None:
    assert "RandAugment 2 x 10+-0.5 p=0.5" in View(rand_augment=2).describe()
    assert "RandAugment" not in View().describe()
