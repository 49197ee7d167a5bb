"""Color operations on batches."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as reference

from golden_cases import Case, golden_cases
from noisy_images import noisy_images, uniform
from sslcli.data.views import augment
from sslcli.data.views.color import LAB_MEAN, LAB_STD, YDBDR_MEAN, YDBDR_STD


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("brightness", 0.0, 2.0), ("contrast", 0.0, 2.0), ("saturation", 0.0, 2.0), ("hue", -0.5, 0.5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_adjustment_equals_torchvision(name: str, low: float, high: float, dtype: torch.dtype) -> None:
    images, factors = noisy_images(32).to(dtype), uniform(low, high, 32)
    factors[:3] = torch.tensor([low, high, (low + high) / 2])
    before = images.clone()
    got = getattr(augment, f"adjust_{name}")(images, factors)
    adjust = getattr(reference, f"adjust_{name}")
    want = torch.stack([adjust(image, float(factor)) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert torch.equal(images, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_equals_torchvisions_operations_one_by_one_in_order(channels: int) -> None:
    images = noisy_images(48)[:, :channels].contiguous()
    factors = torch.stack([uniform(0, 2, 48, seed=k) for k in range(3)] + [uniform(-0.5, 0.5, 48, seed=9)], 1)
    generator = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in images])
    factors[::5, 3] = 0.0
    factors[::7] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    before = images.clone()
    got = augment.color_jitter(images, factors, order)
    operations = [
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    ]
    for image, result, row, sequence in zip(images, got, factors.tolist(), order.tolist(), strict=True):
        for number in sequence:
            image = operations[number](image, row[number])
        # Two orders of rounding: a clamp or a hue near gray may enlarge the last bit a little.
        torch.testing.assert_close(result, image, rtol=0, atol=1e-5)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neutral_factors_leave_every_bit(dtype: torch.dtype) -> None:
    images, ones = noisy_images().to(dtype), torch.ones(16)
    for name in ("brightness", "contrast", "saturation"):
        assert torch.equal(getattr(augment, f"adjust_{name}")(images, ones), images)
    assert torch.equal(augment.adjust_hue(images, ones - 1), images)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(16, 1)
    factors[8:, 0] = 0.5
    order = torch.tensor([3, 2, 1, 0]).repeat(16, 1)
    got = augment.color_jitter(images, factors, order)
    assert torch.equal(got[:8], images[:8])
    assert not torch.equal(got[8:], images[8:])
    # A blend by 1 inside of a batch that is jittered, not only the way past it.
    factors[8:] = torch.tensor([0.99999, 1.0, 1.0, 0.0])
    torch.testing.assert_close(augment.color_jitter(images, factors, order), images, rtol=0, atol=4e-5)


def test_color_jitter_does_not_depend_on_the_rest_of_the_batch() -> None:
    images = noisy_images(20)
    factors = torch.stack([uniform(0.2, 1.8, 20, seed=k) for k in range(3)] + [uniform(-0.2, 0.2, 20)], 1)
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(k)) for k in range(20)])
    together = augment.color_jitter(images, factors, order)
    for k in range(20):
        assert torch.equal(augment.color_jitter(images[[k]], factors[[k]], order[[k]])[0], together[k])


def test_solarize_inverts_the_threshold_itself() -> None:
    images = torch.tensor([0.25, 0.5, 0.75]).view(1, 3, 1, 1)
    got = augment.solarize(images, 0.5, torch.tensor([True]))
    assert got.flatten().tolist() == [0.25, 0.5, 0.25]
    assert augment.solarize(images, 0.25, torch.tensor([True])).flatten().tolist() == [0.75, 0.5, 0.25]


@golden_cases("cmc_lab")
def test_lab_equals_skimage(case: Case) -> None:
    images = (case.inputs["rgb"].to(case.dtype) / 255).permute(0, 3, 1, 2)
    lab = augment.rgb_to_lab(images)
    assert lab.dtype == case.dtype
    case.check(lab, "lab")
    case.check(augment.normalize(lab, LAB_MEAN, LAB_STD), "lab_norm")


def test_lab_of_known_colors() -> None:
    colors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).view(3, 3, 1, 1)
    want = torch.tensor([[100.0, 0.0, 0.0], [53.24, 80.09, 67.20], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(augment.rgb_to_lab(colors).view(3, 3), want, rtol=0, atol=0.05)


def test_ydbdr_has_the_corners_that_define_the_space() -> None:
    # Y is luma, Db = -1.333 .. 1.333 from yellow to blue, Dr the same from red to cyan; gray has no color difference.
    corners = torch.tensor(
        [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    )
    want = torch.tensor(
        [
            [1.0, 0.0, 0.0],
            [0.0, 0.0, 0.0],
            [0.299, -0.45, -1.333],
            [0.114, 1.333, 0.217],
            [0.886, -1.333, -0.217],
            [0.701, 0.45, 1.333],
        ]
    )
    got = augment.rgb_to_ydbdr(corners.view(6, 3, 1, 1)).view(6, 3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert augment.rgb_to_ydbdr(corners.view(6, 3, 1, 1).double()).dtype == torch.float64
    # The constants are about those of ImageNet's mean color, and bring every color to about [-1, 1].
    mean = augment.rgb_to_ydbdr(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)).view(3)
    torch.testing.assert_close(mean, torch.tensor(YDBDR_MEAN), rtol=0, atol=5e-3)
    assert augment.normalize(augment.rgb_to_ydbdr(noisy_images()), YDBDR_MEAN, YDBDR_STD).abs().max() < 1.1


def test_normalize_equals_torchvision_and_refuses_wrong_constants() -> None:
    images, mean, std = noisy_images(), [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    torch.testing.assert_close(augment.normalize(images, mean, std), reference.normalize(images, mean, std))
    with pytest.raises(ValueError, match="one value for each of the 3 channels"):
        augment.normalize(images, [0.5], [0.2])
    with pytest.raises(ValueError, match="above 0 in every channel"):
        augment.normalize(images, mean, [0.2, 0.0, 0.1])


def bands(count: int, channels: int) -> torch.Tensor:
    return torch.cat([noisy_images(count), noisy_images(count).flip(2, 3)], 1)[:, :channels]


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_the_gray_image_of_other_numbers_of_channels_is_their_mean(channels: int) -> None:
    images, half = bands(12, channels), torch.full((12,), 0.5)
    gray = images.mean(1, keepdim=True)
    chosen = torch.arange(12) % 2 == 0
    grayscale = augment.to_grayscale(images, chosen)
    torch.testing.assert_close(grayscale[chosen], gray[chosen].expand(-1, channels, -1, -1))
    assert torch.equal(grayscale[~chosen], images[~chosen])
    torch.testing.assert_close(augment.adjust_saturation(images, half), (images + gray) / 2)
    torch.testing.assert_close(
        augment.adjust_contrast(images, half), (images + gray.mean((2, 3), keepdim=True)) / 2, rtol=0, atol=1e-6
    )
    assert augment.adjust_hue(images, half) is images


@pytest.mark.parametrize("channels", [2, 5])
def test_color_jitter_of_other_numbers_of_channels_is_its_operations_in_order(channels: int) -> None:
    images = bands(24, channels)
    factors = torch.stack([uniform(0, 2, 24, seed=k) for k in range(3)] + [uniform(-0.5, 0.5, 24, seed=9)], 1)
    generator = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in images])
    operations = [augment.adjust_brightness, augment.adjust_contrast, augment.adjust_saturation, augment.adjust_hue]
    wanted = []
    for image, row, sequence in zip(images.split(1), factors, order.tolist(), strict=True):
        for number in sequence:
            image = operations[number](image, row[number : number + 1])
        wanted.append(image)
    torch.testing.assert_close(augment.color_jitter(images, factors, order), torch.cat(wanted), rtol=0, atol=1e-5)
