"""The compiled color operations give the views of the torch operations, which other tests compare with torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from platforms import needs_avx2
from sslcli.data.views.views import Views
from sslcli.kernels import color

ALL: dict[str, Any] = {
    "crop_scale": [0.2, 1.0],
    "jitter": [0.8, 0.8, 0.8, 0.2],
    "jitter_p": 0.8,
    "grayscale": 0.2,
    "flip": 0.5,
    "blur": 0.5,
    "solarize": 0.3,
}
SPECS: dict[str, dict[str, Any]] = {
    "all": ALL,
    "gray first": ALL | {"grayscale_first": True, "grayscale": 0.5},
    "brightness": {"jitter": [0.4, 0.0, 0.0, 0.0], "jitter_p": 1.0},
    "contrast": {"jitter": [0.0, 0.9, 0.0, 0.0], "jitter_p": 1.0},
    "saturation": {"jitter": [0.0, 0.0, 0.9, 0.0], "jitter_p": 1.0},
    "hue": {"jitter": [0.0, 0.0, 0.0, 0.5], "jitter_p": 1.0},
    "flip": {"flip": 0.5},
    "blur": {"blur": 1.0, "blur_sigma": [0.1, 2.0]},
    "solarize": {"solarize": 1.0},
    "gray": {"grayscale": 1.0},
    "nothing": {},
}
SHAPES = [(40, 3, 32, 32), (30, 1, 24, 24), (20, 3, 17, 30), (3, 3, 140, 128)]


def drawn(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Keys and images in [0, 1], the first black, the second white, the third gray."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator)
    images[0], images[1], images[2] = 0.0, 1.0, images[2, :1]
    return torch.arange(shape[0]) * 7919, images


@needs_avx2
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_the_compiled_views_are_those_of_the_operations(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, images = drawn(shape)
    views = Views([SPECS[name]])
    scale = {"mean": [0.4, 0.5, 0.6][: shape[1]], "std": [0.2, 0.25, 0.3][: shape[1]]}
    assert color.library() is not None, "sslcli has to be installed with a C compiler for its tests"
    before = images.clone()
    compiled = views.color(0, key, images, **scale)
    assert torch.equal(images, before)
    monkeypatch.setattr(color, "library", lambda: None)
    expected = views.color(0, key, images, **scale)
    assert compiled.shape == expected.shape
    # Rounding solarizes some pixels at the threshold, and gives others of equal channels a hue.
    apart = (compiled - expected).abs() > 2e-5
    assert apart.float().mean() <= (1e-4 if "solarize" in SPECS[name] else 0)


@pytest.mark.parametrize("options", [{"color_space": "lab"}, {"color_space": "ydbdr"}, {"normalize": False}], ids=str)
def test_other_ends(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    key, images = drawn((20, 3, 32, 32))
    views = Views([ALL | {"solarize": 0.0}], **options)
    scale = {"mean": [0.5] * 3, "std": [0.25] * 3}
    compiled = views.color(0, key, images, **scale)
    monkeypatch.setattr(color, "library", lambda: None)
    torch.testing.assert_close(compiled, views.color(0, key, images, **scale), rtol=1e-4, atol=1e-4)


def test_neither_the_threads_nor_the_rest_of_the_batch_change_a_view() -> None:
    key, images = drawn((30, 3, 32, 32))
    views, scale = Views([ALL]), {"mean": [0.5] * 3, "std": [0.25] * 3}
    whole = views.color(0, key, images, **scale)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(views.color(0, key[7:12], images[7:12], **scale), whole[7:12])
    finally:
        torch.set_num_threads(before)


def test_wrong_values_are_told_as_without_it() -> None:
    key, images = drawn((4, 3, 8, 8))
    with pytest.raises(ValueError, match="one value for each of the 3 channels"):
        Views([ALL | {"blur": 0.0}]).color(0, key, images, mean=[0.5], std=[0.25])
    with pytest.raises(ValueError, match="above 0"):
        Views([ALL | {"blur": 0.0}]).color(0, key, images, mean=[0.5] * 3, std=[0.0] * 3)
    with pytest.raises(ValueError, match="must be at most"):
        Views([ALL | {"blur": 1.0, "blur_kernel": 23}]).color(0, key, images, mean=[0.5] * 3, std=[0.25] * 3)


def test_a_blur_too_wide_for_the_images_is_refused() -> None:
    key, images = drawn((4, 3, 30, 33))
    with pytest.raises(ValueError, match="kernel_size is 301, but for images of 30 x 33 pixels"):
        Views([{"blur": 1e-9, "blur_kernel": 301}]).color(0, key, images, mean=[0.5] * 3, std=[0.2] * 3)
