"""Python interface of the compiled Winograd passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslcli.kernels import winograd_passes
from sslcli.kernels.winograd_passes import LINE, convolve, passes_for, transform, weight_sums
from sslcli.kernels.winograd_transforms import gradient_points, to_points


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("dtype", "channels", "supported"),
    [
        (torch.float32, LINE, True),
        (torch.float32, 3 * LINE, True),
        (torch.float32, LINE + 1, False),
        (torch.float64, LINE, False),
        (torch.bfloat16, LINE, False),
    ],
)
def test_float32_maps_that_fill_cache_lines_are_supported(dtype: torch.dtype, channels: int, supported: bool) -> None:
    maps = torch.zeros(1, 4, 4, channels, dtype=dtype)
    assert (passes_for(maps) is not None) == supported
    assert passes_for(maps, torch.zeros(1, 4, 4, LINE + 1)) is None


def test_the_sums_over_tiles_are_the_products_of_points() -> None:
    maps, gradients = drawn(3, 8, 8, 16), drawn(3, 8, 8, 32)
    found = weight_sums(maps, gradients)
    assert found is not None
    expected = torch.einsum("pto,ptc->poc", gradient_points(gradients).double(), to_points(maps).double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


def test_maps_need_not_be_contiguous() -> None:
    maps, kernels = drawn(2, 16, 8, 8).permute(0, 2, 3, 1), drawn(36, 16, 32)
    found, expected = convolve(maps, kernels), convolve(maps.contiguous(), kernels)
    assert found is not None
    assert expected is not None
    assert found.shape == (2, 8, 8, 32)
    assert torch.equal(found, expected)


def test_too_many_channels_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, kernels, gradients = drawn(1, 4, 4, 16), drawn(36, 16, 32), drawn(1, 4, 4, 32)
    monkeypatch.setattr(winograd_passes, "MOST_KERNELS", 16 * 32 - 1)
    monkeypatch.setattr(winograd_passes, "MOST_SUMS", 16 * 32 - 1)
    assert convolve(maps, kernels) is None
    assert weight_sums(maps, gradients) is None


def test_without_a_compiled_library_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd_passes, "library", lambda: None)
    maps, points = drawn(1, 4, 4, 16), torch.zeros(6, 6, 1, 1, 1, 16)
    assert not transform("to_points", maps, points, maps)
    assert not points.any()
    assert convolve(maps, drawn(36, 16, 32)) is None
    assert weight_sums(maps, maps) is None
