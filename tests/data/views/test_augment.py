from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from noisy_images import noisy_images, uniform
from sslcli.data.views import augment
from sslcli.data.views.color import LAB_MEAN, LAB_STD, YDBDR_MEAN, YDBDR_STD


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
    images, boxes = noisy_images(8, height, width=width), _boxes(8, height, width)
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
    images, boxes = noisy_images(8, 40), _boxes(8, 40, 40, seed=3)
    other = 1 - images
    for image, kept, (top, left, height, width) in zip(other, images, boxes.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = kept[:, top : top + height, left : left + width]
    for interpolation in augment.INTERPOLATIONS:
        got = augment.resized_crop(images, boxes, 32, interpolation=interpolation)
        assert torch.equal(got, augment.resized_crop(other, boxes, 32, interpolation=interpolation))


def test_a_whole_image_at_its_own_size_is_unchanged() -> None:
    images = noisy_images()
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


def test_masks_choose_the_images_for_grayscale_flip_and_solarize() -> None:
    images, mask = noisy_images(), torch.arange(16) % 3 == 0
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


@pytest.mark.parametrize(
    ("height", "width", "taps"), [(32, 32, 3), (32, 32, 1), (48, 40, 9), (24, 24, 23), (12, 9, 17)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_blur_equals_torchvision(height: int, width: int, taps: int, dtype: torch.dtype) -> None:
    images, sigma = noisy_images(6, height, width=width).to(dtype), uniform(0.1, 2.0, 6)
    mask = torch.tensor([True, True, False, True, True, False])
    got = augment.gaussian_blur(images, sigma, taps, mask)
    for image, result, width_of, chosen in zip(images, got, sigma.tolist(), mask.tolist(), strict=True):
        want = reference.gaussian_blur(image, [taps, taps], [width_of, width_of]) if chosen else image
        torch.testing.assert_close(result, want, rtol=0, atol=1e-5)


def test_bfloat16_is_close_to_float32_everywhere() -> None:
    images, mask = noisy_images(), torch.arange(16) % 2 == 0
    half = images.bfloat16()
    factors = torch.stack([uniform(0, 2, seed=k) for k in range(3)] + [uniform(-0.5, 0.5)], 1)
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(k)) for k in range(16)])
    operations = {
        "resized_crop": lambda x: augment.resized_crop(x, _boxes(16, 24, 24), 32, interpolation="bicubic"),
        "flip": lambda x: augment.flip(x, mask),
        "contrast": lambda x: augment.adjust_contrast(x, factors[:, 1]),
        "color_jitter": lambda x: augment.color_jitter(x, factors, order),
        "grayscale": lambda x: augment.to_grayscale(x, mask),
        "blur": lambda x: augment.gaussian_blur(x, uniform(0.1, 2.0), 5, mask),
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
    images, boxes = noisy_images(), _boxes(16, 24, 24)
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
