from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from sslcli.data.rng import mix
from sslcli.data.views import augment
from sslcli.data.views.color import LAB_MEAN, LAB_STD, YDBDR_MEAN, YDBDR_STD
from sslcli.data.views.spec import View
from sslcli.data.views.views import Views
from sslcli.kernels import color

RICH = View(
    count=2,
    crop_scale=(0.08, 1.0),
    jitter=(0.8, 0.8, 0.8, 0.2),
    jitter_p=0.8,
    grayscale=0.2,
    blur=0.5,
    blur_kernel=5,
    solarize=0.2,
)
CONSTANTS: dict[str, Any] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def _keys(count: int, *, seed: int = 0, occurrence: int = 0) -> Tensor:
    return mix(seed, occurrence, torch.arange(count))


def _images(count: int, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def _draw_boxes(count: int = 20_000, *, height: int = 400, width: int = 400, seed: int = 0, **view: Any) -> Tensor:
    views = Views([View(**view)])
    return views.boxes(0, _keys(count, seed=seed), torch.full((count,), height), torch.full((count,), width))


def _make(views: Views, view: int, key: Tensor, images: Tensor, size: int = 32) -> Tensor:
    height = torch.full((len(images),), images.shape[2])
    boxes = views.boxes(view, key, height, torch.full_like(height, images.shape[3]))
    crops = augment.resized_crop(images, boxes, size, interpolation=views.views[view].interpolation)
    return views.color(view, key, crops, **CONSTANTS)


def _ks_to_uniform(values: Tensor, low: float, high: float) -> float:
    """Largest distance between the empirical distribution and the uniform one."""
    ordered = ((values.double() - low) / (high - low)).sort().values
    return float((ordered - (torch.arange(len(ordered)) + 0.5) / len(ordered)).abs().max())


def _ks_of_two(first: Tensor, second: Tensor) -> float:
    points = torch.cat((first, second)).double().unique()
    distributions = [torch.searchsorted(x.double().sort().values, points, right=True) / len(x) for x in (first, second)]
    return float((distributions[0] - distributions[1]).abs().max())


def _captured_jitter(monkeypatch: pytest.MonkeyPatch, view: View, count: int) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []

    def capture(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        seen.append((factors, order))
        return images

    monkeypatch.setattr(color, "library", lambda: None)  # torch's operations get what is drawn
    monkeypatch.setattr(augment, "color_jitter", capture)
    Views([view], normalize=False).color(0, _keys(count), torch.rand(count, 3, 1, 1), **CONSTANTS)
    return seen[0]


@pytest.mark.parametrize("scale", [(0.08, 0.5), (0.2, 0.7), (0.05, 0.14)])
def test_area_is_uniform_and_ratio_log_uniform(scale: tuple[float, float]) -> None:
    # Scales whose boxes always fit, so that no try is rejected; a large image, so that rounding does not show.
    boxes = _draw_boxes(height=4000, width=4000, crop_scale=scale, crop_ratio=(3 / 4, 4 / 3)).double()
    limit = 2.5 / len(boxes) ** 0.5  # exceeded with probability 1e-5
    assert _ks_to_uniform(boxes[:, 2] * boxes[:, 3] / 4000**2, *scale) < limit
    assert _ks_to_uniform((boxes[:, 3] / boxes[:, 2]).log(), math.log(3 / 4), math.log(4 / 3)) < limit
    # The place is uniform among those the size leaves, and independent of it.
    assert _ks_to_uniform((boxes[:, 0] + 0.5) / (4001 - boxes[:, 2]), 0, 1) < limit
    assert _ks_to_uniform((boxes[:, 1] + 0.5) / (4001 - boxes[:, 3]), 0, 1) < limit
    columns = torch.stack((boxes[:, 0] / (4001 - boxes[:, 2]), boxes[:, 1] / (4001 - boxes[:, 3]), boxes[:, 2]))
    assert (torch.corrcoef(columns) - torch.eye(3)).abs().max() < 5 / len(boxes) ** 0.5


def test_ratio_is_width_over_height() -> None:
    boxes = _draw_boxes(2000, height=1000, width=1000, crop_scale=(0.1, 0.2), crop_ratio=(0.4, 0.6)).double()
    ratio = boxes[:, 3] / boxes[:, 2]
    assert 0.39 < ratio.min() < 0.41
    assert 0.59 < ratio.max() < 0.61


@pytest.mark.parametrize(("height", "width"), [(32, 32), (120, 200), (60, 300)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    count, theirs_count = 20_000, 2500
    ours = _draw_boxes(count, height=height, width=width, crop_scale=scale)
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(theirs_count)]
    )
    limit = 2.5 * (1 / count + 1 / theirs_count) ** 0.5
    for measure in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
    ):
        mine, other = measure(ours).double(), measure(theirs).double()
        assert _ks_of_two(mine, other) < limit
        assert abs(mine.mean() - other.mean()) < 5 * other.std() * (1 / count + 1 / theirs_count) ** 0.5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (200, 3), (32, 32), (51, 37)])
def test_boxes_lie_inside_of_the_image(height: int, width: int) -> None:
    boxes = _draw_boxes(5000, height=height, width=width, crop_scale=(0.01, 1.0), crop_ratio=(0.2, 5.0))
    assert boxes.dtype == torch.int64
    assert boxes.shape == (5000, 4)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_all_places_of_a_small_image_occur() -> None:
    boxes = _draw_boxes(5000, height=4, width=4, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    assert set(map(tuple, boxes[:, :2].tolist())) == set(itertools.product(range(3), range(3)))


def test_no_crop_takes_the_whole_image() -> None:
    boxes = _draw_boxes(5, height=20, width=30, crop_scale=None)
    assert boxes.tolist() == [[0, 0, 20, 30]] * 5


def test_images_of_different_sizes_share_a_batch() -> None:
    views, key = Views([RICH]), _keys(50)
    height, width = torch.arange(50) % 7 * 13 + 5, torch.arange(50) % 11 * 9 + 5
    boxes = views.boxes(1, key, height, width)
    for k in range(50):
        assert torch.equal(views.boxes(1, key[[k]], height[[k]], width[[k]])[0], boxes[k])


def test_flip_and_grayscale_and_solarize_come_at_their_rates() -> None:
    count = 20_000
    images = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.5, 0.6]).view(1, 3, 1, 2).expand(count, 3, 1, 2)
    for name, rate in (("flip", 0.5), ("flip", 0.1), ("grayscale", 0.2), ("solarize", 0.2)):
        views = Views([View(**{"flip": 0.0, name: rate})], normalize=False)
        changed = (views.color(0, _keys(count), images, **CONSTANTS) != images).flatten(1).any(1)
        assert abs(changed.double().mean() - rate) < 5 * (rate * (1 - rate) / count) ** 0.5


def test_jitter_factors_are_uniform_over_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    factors, _ = _captured_jitter(monkeypatch, View(jitter=(0.4, 0.8, 1.5, 0.2)), 20_000)
    limit = 2.5 / 20_000**0.5
    for values, low, high in zip(factors.unbind(1), (0.6, 0.2, 0.0, -0.2), (1.4, 1.8, 2.5, 0.2), strict=True):
        assert _ks_to_uniform(values, low, high) < limit
    assert (torch.corrcoef(factors.T) - torch.eye(4)).abs().max() < 5 / 20_000**0.5


def test_jitter_order_is_uniform_over_all_24_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    factors, order = _captured_jitter(monkeypatch, View(jitter=(0.4, 0.4, 0.4, 0.1)), 24_000)
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(24_000, 4))
    permutations, counts = order.unique(dim=0, return_counts=True)
    assert len(permutations) == 24
    assert (counts - 1000).abs().max() < 5 * 1000**0.5
    early = (order[:, 0] == 0).float()
    assert abs(torch.corrcoef(torch.stack((early, factors[:, 0])))[0, 1]) < 5 / 24_000**0.5


def test_jitter_leaves_the_others_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    factors, _ = _captured_jitter(monkeypatch, View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8), 20_000)
    untouched = (factors == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(1)
    assert abs(untouched.double().mean() - 0.2) < 5 * (0.16 / 20_000) ** 0.5


def test_blur_width_is_uniform_and_comes_at_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(color, "library", lambda: None)  # what is drawn is seen where torch's operations get it
    monkeypatch.setattr(augment, "gaussian_blur", lambda images, *rest: seen.append(rest) or images)
    view = View(blur=0.5, blur_sigma=(0.1, 2.0))
    Views([view], normalize=False).color(0, _keys(20_000), torch.rand(20_000, 3, 2, 2), **CONSTANTS)
    sigma, _, mask = seen[0]
    assert abs(mask.double().mean() - 0.5) < 5 * (0.25 / 20_000) ** 0.5
    assert _ks_to_uniform(sigma, 0.1, 2.0) < 2.5 / 20_000**0.5
    assert _ks_to_uniform(sigma[mask], 0.1, 2.0) < 2.5 / 10_000**0.5


@pytest.mark.parametrize("grayscale_first", [False, True])
def test_color_applies_the_operations_in_the_documented_order(grayscale_first: bool) -> None:
    # Everything always happens, with only one value possible; then torchvision can say the result.
    view = View(
        flip=1.0,
        jitter=(0.0, 0.0, 0.0, 0.3),
        grayscale=1.0,
        grayscale_first=grayscale_first,
        blur=1.0,
        blur_sigma=(1.5, 1.5),
        blur_kernel=5,
        solarize=1.0,
        solarize_threshold=0.4,
    )
    images = _images(6, 16)
    got = Views([view]).color(0, _keys(6), images, **CONSTANTS)
    gray = [reference.rgb_to_grayscale(image.flip(2), 3) for image in images]
    for result, image in zip(got, gray, strict=True):
        # The hue of a gray pixel does nothing; of a colored one it changes the gray value.
        want = reference.gaussian_blur(image, [5, 5], [1.5, 1.5])
        want = reference.normalize(reference.solarize(want, 0.4), **CONSTANTS)
        assert ((result - want).abs().max() < 1e-4) == grayscale_first


def test_finish_is_the_end_of_color() -> None:
    images = _images(5)
    for space, normalize in itertools.product(("rgb", "lab", "ydbdr"), (True, False)):
        views = Views([View(flip=0.0)], normalize=normalize, color_space=space)
        assert torch.equal(views.color(0, _keys(5), images, **CONSTANTS), views.finish(images, **CONSTANTS))
    lab = augment.normalize(augment.rgb_to_lab(images), LAB_MEAN, LAB_STD)
    assert torch.equal(Views([View()], color_space="lab").finish(images, **CONSTANTS), lab)
    assert lab.abs().max() <= 1
    ydbdr = augment.normalize(augment.rgb_to_ydbdr(images), YDBDR_MEAN, YDBDR_STD)
    assert torch.equal(Views([View()], color_space="ydbdr").finish(images, **CONSTANTS), ydbdr)
    assert torch.equal(Views([View()], normalize=False).finish(images, **CONSTANTS), images)


@pytest.mark.parametrize("part", [1, 8])
@pytest.mark.parametrize("space", ["rgb", "lab", "ydbdr"])
def test_a_view_is_the_same_in_any_batch(part: int, space: str) -> None:
    views, key, images = Views([RICH], color_space=space), _keys(64), (_images(64, 40) * 255).byte()
    size = torch.full((64,), 40)
    for view in range(2):
        whole = _make(views, view, key, images)
        parts = [slice(start, start + part) for start in range(0, 64, part)]
        boxes = torch.cat([views.boxes(view, key[p], size[p], size[p]) for p in parts])
        assert torch.equal(boxes, views.boxes(view, key, size, size))
        split = torch.cat([_make(views, view, key[p], images[p]) for p in parts])
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)
        backwards = _make(views, view, key.flip(0), images.flip(0)).flip(0)
        torch.testing.assert_close(backwards, whole, rtol=0, atol=1e-6)


@pytest.fixture
def thread_count() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_a_view_is_the_same_on_any_number_of_threads(thread_count: int) -> None:
    views, key, images = Views([RICH]), _keys(32), _images(32, 64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(_make(views, 0, key, images, size=64))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_views_visits_seeds_and_images_differ() -> None:
    views, images = Views([RICH]), _images(1).expand(32, 3, 32, 32)
    base = _make(views, 0, _keys(32), images)
    assert torch.equal(base, _make(views, 0, _keys(32), images))
    for other in (
        _make(views, 1, _keys(32), images),
        _make(views, 0, _keys(32, occurrence=1), images),
        _make(views, 0, _keys(32, occurrence=1 << 32), images),
        _make(views, 0, _keys(32, seed=1), images),
        base.roll(1, 0),
    ):
        assert ((base - other).abs().flatten(1).max(1).values > 0.05).all()


def test_two_equal_entries_are_drawn_apart_like_one_with_count_two() -> None:
    images, entry = _images(8), {"crop_scale": [0.2, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1]}
    twice, counted = Views([entry, entry]), Views([{**entry, "count": 2}])
    assert twice.num_views == counted.num_views == 2
    for view in range(2):
        assert torch.equal(_make(twice, view, _keys(8), images), _make(counted, view, _keys(8), images))


def test_color_leaves_its_input_alone_and_keeps_its_type() -> None:
    images = _images(32)
    before = images.clone()
    whole = Views([RICH]).color(0, _keys(32), images, **CONSTANTS)
    assert torch.equal(images, before)
    for dtype in (torch.float64, torch.bfloat16):
        got = Views([View(jitter=(0.4, 0.4, 0.4, 0.1))]).color(0, _keys(32), images.to(dtype), **CONSTANTS)
        assert got.dtype == dtype
        assert got.isfinite().all()
    assert whole.dtype == torch.float32
    assert Views([RICH]).color(0, _keys(0), images[:0], **CONSTANTS).shape == (0, 3, 32, 32)


def test_gray_sets_of_one_channel_work() -> None:
    images = _images(16)[:, :1]
    got = Views([RICH], normalize=False).color(0, _keys(16), images, mean=[0.5], std=[0.5])
    assert got.shape == (16, 1, 32, 32)
    assert got.min() >= 0
    assert got.max() <= 1 + 1e-6


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("color_space", ["rgb", "lab", "ydbdr"])
def test_finished_images_can_be_restored_to_be_looked_at(color_space: str, normalize: bool) -> None:
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    images[0], images[1], images[2] = 0.0, 1.0, images[2].round()
    views = Views([{"count": 1}], normalize=normalize, color_space=color_space)
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    restored = views.restore(views.finish(images, **statistics), **statistics)
    torch.testing.assert_close(restored, images, rtol=0, atol=2e-3)


def test_what_lies_outside_of_the_colors_of_an_image_is_clamped_in_pictures() -> None:
    views = Views([{"count": 1}])
    restored = views.restore(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2), mean=(0.5,), std=(0.25,))
    assert restored.flatten().tolist() == [0, 1]


def test_views_of_an_entry_are_made_together_two_and_two():
    views = Views([View(count=3), View(size=16), View(count=2)])
    assert views.groups == [range(2), range(2, 3), range(3, 4), range(4, 6)]


def test_views_made_together_are_those_made_alone():
    views, images = Views([RICH]), _images(12)
    view, key = torch.arange(2).repeat_interleave(12), _keys(12).repeat(2)
    side = torch.full((24,), 32)
    assert torch.equal(
        views.boxes(view, key, side, side),
        torch.cat([views.boxes(number, key[:12], side[:12], side[:12]) for number in range(2)]),
    )
    together = views.color(view, key, images.repeat(2, 1, 1, 1), **CONSTANTS)
    alone = torch.cat([views.color(number, key[:12], images, **CONSTANTS) for number in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert not torch.equal(together[:12], together[12:])


def test_the_statistics_are_those_that_finish_applies() -> None:
    images = torch.rand(2, 3, 4, 4)
    for space, convert in (("rgb", lambda x: x), ("lab", augment.rgb_to_lab), ("ydbdr", augment.rgb_to_ydbdr)):
        for normalize in (True, False):
            views = Views([View()], normalize=normalize, color_space=space)
            mean, std = views.statistics(**CONSTANTS)
            assert torch.equal(augment.normalize(convert(images), mean, std), views.finish(images, **CONSTANTS))
            if not normalize:
                assert (mean, std) == ([0.0] * 3, [1.0] * 3)
