"""Division of images into patches, and augmentation of each patch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslcli.methods.cpc_patches import PatchAugmentation, patch_size, patchify, row_offsets
from sslcli.nn.noise import Noise


@pytest.mark.parametrize(
    ("size", "patch", "grid"),
    [(32, 8, 7), (64, 16, 7), (96, 24, 7), (224, 56, 7), (256, 64, 7), (28, 8, 6), (30, 10, 5)],
)
def test_the_grid_is_7_or_the_nearest_with_patches_of_8_pixels(size: int, patch: int, grid: int) -> None:
    assert patch_size(size, None) == patch == patch_size(size, grid)
    patches = patchify(torch.randn(2, 3, size, size), patch)
    assert patches.shape == (2, grid, grid, 3, patch, patch)


@pytest.mark.parametrize(
    ("size", "min_patch_size", "grid"),
    [(32, 16, 3), (64, 16, 7), (96, 16, 7), (224, 16, 7), (28, 16, 3), (30, 16, 4), (32, 4, 7), (48, 24, 3)],
)
def test_the_grid_gives_patches_of_the_minimum_size_or_the_largest_there_are(
    size: int, min_patch_size: int, grid: int
) -> None:
    assert patch_size(size, None, min_patch_size=min_patch_size) == 2 * size // (grid + 1)
    assert patch_size(size, 3 if size % 4 == 0 else 4, min_patch_size=64) == 2 * size // (4 if size % 4 == 0 else 5)
    with pytest.raises(ValueError, match="min_patch_size is 0"):
        patch_size(size, None, min_patch_size=0)


def test_the_skipped_rows_are_two_or_fewer_if_the_grid_is_smaller() -> None:
    assert row_offsets(None, skip=None, grid=7) == range(3, 7)
    assert row_offsets(1, skip=None, grid=7) == range(3, 4)
    assert row_offsets(None, skip=None, grid=3) == range(2, 3)
    with pytest.raises(ValueError, match=r"skip is 2, but it must be 0 to 1 .*or null"):
        row_offsets(None, skip=2, grid=3)


@pytest.mark.parametrize("size", [32, 96])
def test_overlapping_patches_put_back_and_averaged_are_the_image(size: int) -> None:
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    p = patch_size(size, None)
    patches = patchify(images, p)
    total, count = torch.zeros_like(images), torch.zeros(size, size)
    for i in range(patches.shape[1]):
        for j in range(patches.shape[2]):
            rows, columns = slice(i * p // 2, i * p // 2 + p), slice(j * p // 2, j * p // 2 + p)
            total[:, :, rows, columns] += patches[:, i, j]
            count[rows, columns] += 1
    torch.testing.assert_close(total / count, images)
    assert torch.equal(patches[:, 0, 1, :, :, : p // 2], patches[:, 0, 0, :, :, p // 2 :])
    assert torch.equal(patches[:, 1, 0, :, : p // 2], patches[:, 0, 0, :, p // 2 :])


@pytest.mark.parametrize(
    ("size", "grid", "message"),
    [
        (32, 6, r"grid is 6, but images of 32 pixels .* set grid to one of 3, 7, 15, or to null .* multiple of 7"),
        (32, 1, "grid is 1, "),
        (33, None, r"images of 33 pixels have no grid .*method\.grid can be: 10"),
        (13, None, r"images of 13 pixels have no grid .*method.grid can be: none"),
    ],
)
def test_images_that_no_grid_fits_are_refused_with_what_would(size: int, grid: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_size(size, grid)


def test_images_that_patches_do_not_cover_are_refused() -> None:
    for height, width in ((30, 30), (32, 28), (4, 4)):
        with pytest.raises(ValueError, match=f"{height} x {width} pixels .* multiple of 4, at least 8"):
            patchify(torch.zeros(1, 3, height, width), 8)


def augmented(patches: Tensor, **strengths: float) -> Tensor:
    torch.manual_seed(0)
    return PatchAugmentation(**strengths)(patches, Noise())


def test_nothing_is_done_to_patches_by_default() -> None:
    patches = torch.rand(2, 3, 3, 3, 8, 8)
    assert torch.equal(augmented(patches), patches)
    assert torch.equal(augmented(patches, jitter=1.0, shear=1.0), patches)  # their shares are 0


def test_patches_change_one_by_one_and_as_often_as_asked() -> None:
    patches = torch.rand(1, 1, 1, 3, 8, 8).expand(40, 7, 7, 3, 8, 8)
    for strengths in ({"jitter": 0.4, "jitter_p": 0.8}, {"grayscale": 0.25}, {"shear": 0.3, "shear_p": 0.2}):
        out = augmented(patches, **strengths)  # type: ignore[arg-type]
        changed = (out != patches).flatten(3).any(3).double().mean()
        fraction = next(value for name, value in strengths.items() if name in ("jitter_p", "grayscale", "shear_p"))
        assert float(changed) == pytest.approx(fraction, abs=0.03), strengths
    first, second = augmented(patches, jitter=0.4, jitter_p=1.0)[0, 0, :2]
    assert not torch.equal(first, second)


def test_gray_patches_have_equal_channels_and_the_same_brightness() -> None:
    patches = torch.rand(2, 3, 3, 3, 8, 8)
    out = augmented(patches, grayscale=1.0)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(out, (patches * luma).sum(3, keepdim=True).expand_as(patches))


def test_dropping_colors_keeps_one_channel_each_as_often() -> None:
    patches = torch.rand(40, 7, 7, 3, 8, 8) + 0.1
    out = augmented(patches, drop_colors=1.0)
    kept = (out != 0).flatten(4).all(4)  # (N, g, g, 3)
    assert torch.equal(kept.sum(3), torch.ones(40, 7, 7, dtype=torch.long))
    assert torch.equal(out[kept], patches[kept])
    torch.testing.assert_close(kept.double().mean((0, 1, 2)), torch.full((3,), 1 / 3).double(), atol=0.03, rtol=0)


@pytest.mark.parametrize(("side", "margin"), [(8, 1), (16, 1), (64, 4)])
def test_a_crop_moves_what_it_shows_by_up_to_its_margin_within_zeros(side: int, margin: int) -> None:
    patches = torch.rand(8, 3, 3, 3, side, side) + 0.1
    out = augmented(patches, crop=1 / 16)
    edge, kept = margin // 2, side - margin
    inside = out[..., edge : edge + kept, edge : edge + kept]
    assert int((out != 0).sum()) == inside.numel() == int((inside != 0).sum())
    places = set()
    for patch, crop in zip(patches.flatten(0, 2), inside.flatten(0, 2), strict=True):
        fits = [
            (y, x)
            for y in range(margin + 1)
            for x in range(margin + 1)
            if torch.equal(patch[:, y : y + kept, x : x + kept], crop)
        ]
        assert len(fits) == 1
        places |= set(fits)
    assert len(places) >= 4


def test_shear_moves_rows_against_each_other_about_the_middle() -> None:
    ramp = torch.arange(8.0).expand(3, 8, 8)
    out = augmented(ramp.expand(20, 2, 2, 3, 8, 8), shear=0.2, shear_p=1.0)[..., 2:6, 2:6].flatten(0, 3)
    down = out.diff(dim=1).flatten(1)
    torch.testing.assert_close(down, down[:, :1].expand_as(down), atol=1e-4, rtol=0)  # the same in all rows
    assert 0.05 < float(down.abs().max()) <= 0.2 + 1e-4
    assert float(down.min()) < 0 < float(down.max())


@pytest.mark.parametrize("channels", [1, 2])
def test_images_without_three_channels_keep_their_colors(channels: int) -> None:
    patches = torch.rand(2, 3, 3, channels, 8, 8)
    assert torch.equal(augmented(patches, grayscale=1.0, drop_colors=1.0), patches)
    assert augmented(patches, jitter=0.4, jitter_p=1.0).shape == patches.shape


@pytest.mark.parametrize("name", ["crop", "jitter", "jitter_p", "grayscale", "drop_colors", "shear", "shear_p"])
def test_shares_and_strengths_outside_0_to_1_are_refused(name: str) -> None:
    for value in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            PatchAugmentation(**{name: value})
