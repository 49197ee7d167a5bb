from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from golden_cases import Case, golden_cases
from sslcli.data.views import augment
from sslcli.data.views.color import LAB_MEAN, LAB_STD, YDBDR_MEAN, YDBDR_STD


def _images(count: int = 16, size: int = 24, *, width: int | None = None, seed: int = 0) -> Tensor:
    """Noise with gray, saturated, black and white images among it, where the branches of the color maths meet."""
    images = torch.rand(count, 3, size, width or size, generator=torch.Generator().manual_seed(seed))
    images[1] = images[1, :1]
    images[2] = images[2].round()
    images[3, :, : size // 2] = 0.0
    images[3, :, size // 2 :] = 1.0
    return images


def _between(low: float, high: float, count: int = 16, seed: int = 1) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed))


def _boxes(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(4, count, generator=generator)
    box_height, box_width = (place[0] * height).long() + 1, (place[1] * width).long() + 1
    top, left = (place[2] * (height - box_height + 1)).long(), (place[3] * (width - box_width + 1)).long()
    return torch.stack((top, left, box_height, box_width), 1)


def _every(mask_of: Tensor) -> Tensor:
    return torch.ones(len(mask_of), dtype=torch.bool)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (40, 57, 32), (20, 30, 64), (180, 240, 96), (250, 190, 224)]
)
def test_resized_crop_equals_torchvision(height: int, width: int, size: int, interpolation: str) -> None:
    images, boxes = _images(8, height, width=width), _boxes(8, height, width)
    boxes[0] = torch.tensor([0, 0, height, width])
    boxes[1, 2:] = 1
    got = augment.resized_crop(images, boxes, size, interpolation=interpolation)
    mode = InterpolationMode(interpolation)
    want = torch.stack(
        [
            reference.resized_crop(image, *box, [size, size], interpolation=mode, antialias=True).clamp(0, 1)
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert got.is_contiguous()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_crop_of_bytes_is_within_a_level_of_torchvisions_bytes(interpolation: str) -> None:
    # Smooth images: on noise torchvision's own bytes differ from its floats by ten levels and more, because it rounds
    # and clamps to bytes between the two directions.
    noise, boxes = torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)), _boxes(8, 48, 48)
    smooth = reference.resize(noise, [48, 48], antialias=True)
    images = (smooth * 255).round().byte()
    got = augment.resized_crop(images, boxes, 32, interpolation=interpolation)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, augment.resized_crop(images / 255, boxes, 32, interpolation=interpolation))
    mode = InterpolationMode(interpolation)
    for crop, image, box in zip(got, images, boxes.tolist(), strict=True):
        want = reference.resized_crop(image, *box, [32, 32], interpolation=mode, antialias=True)
        assert (crop - want / 255).abs().max() < 2 / 255


def test_resized_crop_ignores_all_pixels_outside_of_the_box() -> None:
    images, boxes = _images(8, 40), _boxes(8, 40, 40, seed=3)
    other = 1 - images
    for image, kept, (top, left, height, width) in zip(other, images, boxes.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = kept[:, top : top + height, left : left + width]
    for interpolation in augment.INTERPOLATIONS:
        got = augment.resized_crop(images, boxes, 32, interpolation=interpolation)
        assert torch.equal(got, augment.resized_crop(other, boxes, 32, interpolation=interpolation))


def test_a_whole_image_at_its_own_size_is_unchanged() -> None:
    images = _images()
    boxes = torch.tensor([0, 0, 24, 24]).expand(16, 4)
    for interpolation in augment.INTERPOLATIONS:
        assert torch.equal(augment.resized_crop(images, boxes, 24, interpolation=interpolation), images)


def test_crop_boxes_of_impossible_tries_fall_back_as_torchvision_does() -> None:
    sizes = [(10, 100), (100, 10), (50, 51), (7, 33), (120, 91), (3, 4)]
    height, width = torch.tensor(sizes).unbind(1)
    tries = torch.full((len(sizes), 10), 9.0)
    boxes = augment.crop_boxes(tries, tries / 9, torch.rand(len(sizes), 2), height, width, ratio_range=(3 / 4, 4 / 3))
    for box, (rows, columns) in zip(boxes.tolist(), sizes, strict=True):
        blank = torch.empty(3, rows, columns)
        assert tuple(box) == RandomResizedCrop.get_params(blank, scale=[9.0, 9.1], ratio=[3 / 4, 4 / 3])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("brightness", 0.0, 2.0), ("contrast", 0.0, 2.0), ("saturation", 0.0, 2.0), ("hue", -0.5, 0.5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_adjustment_equals_torchvision(name: str, low: float, high: float, dtype: torch.dtype) -> None:
    images, factors = _images(32).to(dtype), _between(low, high, 32)
    factors[:3] = torch.tensor([low, high, (low + high) / 2])
    before = images.clone()
    got = getattr(augment, f"adjust_{name}")(images, factors)
    adjust = getattr(reference, f"adjust_{name}")
    want = torch.stack([adjust(image, float(factor)) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert torch.equal(images, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_equals_torchvisions_operations_one_by_one_in_order(channels: int) -> None:
    images = _images(48)[:, :channels].contiguous()
    factors = torch.stack([_between(0, 2, 48, seed=k) for k in range(3)] + [_between(-0.5, 0.5, 48, seed=9)], 1)
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
    images, ones = _images().to(dtype), torch.ones(16)
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
    images = _images(20)
    factors = torch.stack([_between(0.2, 1.8, 20, seed=k) for k in range(3)] + [_between(-0.2, 0.2, 20)], 1)
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(k)) for k in range(20)])
    together = augment.color_jitter(images, factors, order)
    for k in range(20):
        assert torch.equal(augment.color_jitter(images[[k]], factors[[k]], order[[k]])[0], together[k])


def test_masks_choose_the_images_for_grayscale_flip_and_solarize() -> None:
    images, mask = _images(), torch.arange(16) % 3 == 0
    for got, want in (
        (augment.to_grayscale(images, mask), reference.rgb_to_grayscale(images, 3)),
        (augment.flip(images, mask), reference.horizontal_flip(images)),
        (augment.solarize(images, 0.4, mask), reference.solarize(images, 0.4)),
    ):
        torch.testing.assert_close(got[mask], want[mask], rtol=0, atol=1e-6)
        assert torch.equal(got[~mask], images[~mask])
        assert not torch.equal(got, images)
    nobody = torch.zeros(16, dtype=torch.bool)
    assert torch.equal(augment.flip(images, nobody), images)
    assert torch.equal(augment.flip(images, ~nobody), images.flip(3))


def test_solarize_inverts_the_threshold_itself() -> None:
    images = torch.tensor([0.25, 0.5, 0.75]).view(1, 3, 1, 1)
    got = augment.solarize(images, 0.5, torch.tensor([True]))
    assert got.flatten().tolist() == [0.25, 0.5, 0.25]
    assert augment.solarize(images, 0.25, torch.tensor([True])).flatten().tolist() == [0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("height", "width", "taps"), [(32, 32, 3), (32, 32, 1), (48, 40, 9), (24, 24, 23), (12, 9, 17)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_blur_equals_torchvision(height: int, width: int, taps: int, dtype: torch.dtype) -> None:
    images, sigma = _images(6, height, width=width).to(dtype), _between(0.1, 2.0, 6)
    mask = torch.tensor([True, True, False, True, True, False])
    got = augment.gaussian_blur(images, sigma, taps, mask)
    for image, result, width_of, chosen in zip(images, got, sigma.tolist(), mask.tolist(), strict=True):
        want = reference.gaussian_blur(image, [taps, taps], [width_of, width_of]) if chosen else image
        torch.testing.assert_close(result, want, rtol=0, atol=1e-5)


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
    assert augment.normalize(augment.rgb_to_ydbdr(_images()), YDBDR_MEAN, YDBDR_STD).abs().max() < 1.1


def test_normalize_equals_torchvision_and_refuses_wrong_constants() -> None:
    images, mean, std = _images(), [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    torch.testing.assert_close(augment.normalize(images, mean, std), reference.normalize(images, mean, std))
    with pytest.raises(ValueError, match="one value for each of the 3 channels"):
        augment.normalize(images, [0.5], [0.2])
    with pytest.raises(ValueError, match="above 0 in every channel"):
        augment.normalize(images, mean, [0.2, 0.0, 0.1])


def test_bfloat16_is_close_to_float32_everywhere() -> None:
    images, mask = _images(), torch.arange(16) % 2 == 0
    half = images.bfloat16()
    factors = torch.stack([_between(0, 2, seed=k) for k in range(3)] + [_between(-0.5, 0.5)], 1)
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(k)) for k in range(16)])
    operations = {
        "resized_crop": lambda x: augment.resized_crop(x, _boxes(16, 24, 24), 32, interpolation="bicubic"),
        "flip": lambda x: augment.flip(x, mask),
        "contrast": lambda x: augment.adjust_contrast(x, factors[:, 1]),
        "color_jitter": lambda x: augment.color_jitter(x, factors, order),
        "grayscale": lambda x: augment.to_grayscale(x, mask),
        "blur": lambda x: augment.gaussian_blur(x, _between(0.1, 2.0), 5, mask),
        "solarize": lambda x: augment.solarize(x, 0.5, mask),
        "lab": lambda x: augment.normalize(augment.rgb_to_lab(x), LAB_MEAN, LAB_STD),
        "ydbdr": lambda x: augment.normalize(augment.rgb_to_ydbdr(x), YDBDR_MEAN, YDBDR_STD),
        "normalize": lambda x: augment.normalize(x, [0.5] * 3, [0.25] * 3),
    }
    for name, operation in operations.items():
        got, want = operation(half), operation(half.float())
        assert got.dtype == torch.bfloat16, name
        torch.testing.assert_close(
            got.float(), want, rtol=2e-2, atol=2e-2, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_wrong_arguments_are_refused() -> None:
    images, boxes = _images(), _boxes(16, 24, 24)
    with pytest.raises(ValueError, match="size is 0, but it must be at least 1"):
        augment.resized_crop(images, boxes, 0)
    with pytest.raises(ValueError, match="'nearest', but it must be one of bilinear, bicubic"):
        augment.resized_crop(images, boxes, 8, interpolation="nearest")
    with pytest.raises(ValueError, match="kernel_size is 4, but it must be an odd"):
        augment.gaussian_blur(images, torch.ones(16), 4, _every(images))
    with pytest.raises(ValueError, match=r"kernel_size is 49, .* at most 47"):
        augment.gaussian_blur(images, torch.ones(16), 49, _every(images))
    with pytest.raises(ValueError, match='"lab" needs images of 3 channels'):
        augment.rgb_to_lab(images[:, :1])
    with pytest.raises(ValueError, match='"ydbdr" needs images of 3 channels'):
        augment.rgb_to_ydbdr(images[:, :1])
    with pytest.raises(ValueError, match="1 or 3 channels, but these have 2"):
        augment.to_grayscale(images[:, :2], _every(images))
