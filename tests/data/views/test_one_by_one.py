"""Large images one at a time, against the batched operations, which are tested against torchvision's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sslcli.data import rng
from sslcli.data.views import one_by_one
from sslcli.data.views.views import Views
from sslcli.kernels import color as compiled

CONSTANTS: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
STRONG = {"jitter": [0.8, 0.8, 0.8, 0.4], "jitter_p": 0.8, "grayscale": 0.3, "blur": 0.6, "solarize": 0.3, "flip": 0.5}


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)


def images(count: int, height: int = 130, width: int = 133, channels: int = 3) -> Tensor:
    """Noise, with gray, black and white patches."""
    made = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))
    made[:, :, :20, :20] = made[:, :1, :20, :20]
    made[:, :, 20:30], made[:, :, 30:40] = 0, 1
    return made


def color(view: dict[str, Any], given: Tensor, **options: Any) -> Tensor:
    key = rng.mix(5, torch.arange(len(given)))
    return Views([view], **options).color(0, key, given, **CONSTANTS)


@pytest.mark.parametrize(
    "view",
    [STRONG, STRONG | {"grayscale_first": True}, STRONG | {"blur_kernel": 41}, {"blur": 1.0, "blur_sigma": [3, 9]}],
    ids=["all", "gray first", "many taps", "blur"],
)
def test_one_at_a_time_equals_the_batched_operations(view: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = images(40)
    before = given.clone()
    found = color(view, given, normalize=False)
    monkeypatch.setattr(one_by_one, "LARGE", 10**9)
    wanted = color(view, given, normalize=False)
    assert torch.equal(given, before)
    # A value within rounding of the threshold is solarized by one and not by the other.
    apart = (found - wanted).abs() > 2e-5
    assert apart.float().mean() < (1e-4 if "solarize" in view else 1e-9)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_and_channels_stay(channels: int, dtype: torch.dtype) -> None:
    view = {"jitter": [0.4, 0.4, 0.4, 0.1], "blur": 0.5, "grayscale": 0.3}
    key = rng.mix(5, torch.arange(6))
    given = images(6, channels=channels)
    constants = {"mean": (0.5,) * channels, "std": (1.0,) * channels}
    one, other = (Views([view]).color(0, key, given.to(kind), **constants) for kind in (dtype, torch.float32))
    assert one.dtype == dtype
    torch.testing.assert_close(one.float(), other, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 2e-5)


def test_nothing_depends_on_the_batch_and_the_number_of_threads_stays() -> None:
    given, before = images(7), torch.get_num_threads()
    whole = color(STRONG, given)
    try:
        torch.set_num_threads(3)
        assert torch.equal(whole[:2], color(STRONG, given[:2]))
        assert torch.get_num_threads() == 3
        with one_by_one.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_blur_too_wide_for_the_images_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size=301 is too large for images of 130 x 133"):
        color({"blur": 1e-9, "blur_kernel": 301}, images(1))
