from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from sslcli.data.sources import shapes
from sslcli.data.sources.shapes import CLASSES, Nuisances, draw

NAMES = [field.name for field in fields(Nuisances)]
OFF = Nuisances(**dict.fromkeys(NAMES, 0.0))
FILL = round(0.85 * 255)
GROUND = round(0.25 * 255)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def only(name: str, strength: float = 1.0) -> Nuisances:
    return replace(OFF, **{name: strength})


def of_class(images: Tensor, labels: Tensor, name: str) -> Tensor:
    return images[labels == CLASSES.index(name)]


@pytest.mark.parametrize("size", [32, 50])
def test_an_image_drawn_alone_equals_its_row_in_any_batch(size: int) -> None:
    images, labels = draw(torch.arange(40), seed=3, size=size)
    for i in (0, 5, 39):
        alone, label = draw(torch.tensor([i]), seed=3, size=size)
        assert torch.equal(alone[0], images[i])
        assert label[0] == labels[i]
    order = torch.tensor([7, 7, 31, 2])
    assert torch.equal(draw(order, seed=3, size=size)[0], images[order])


def test_chunks_and_threads_do_not_change_a_pixel(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    indices = torch.arange(80)
    torch.set_num_threads(1)
    expected, _ = draw(indices, seed=0, size=64)
    torch.set_num_threads(2)
    assert torch.equal(draw(indices, seed=0, size=64)[0], expected)
    monkeypatch.setattr(shapes, "_CHUNK_PIXELS", 3 * 64 * 64)
    assert torch.equal(draw(indices, seed=0, size=64)[0], expected)


def test_drawing_takes_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    expected, state = draw(torch.arange(4), seed=0, size=32)[0], torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(draw(torch.arange(4), seed=0, size=32)[0], expected)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_set_is_the_one_that_was_published() -> None:
    # Results on different machines and versions are comparable only while these pixels stay as they are.
    images, labels = draw(torch.arange(64), seed=0, size=32)
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert digest[:16] == "3cfa4a5fe8dd1170"


def test_seed_and_index_change_the_image() -> None:
    images, _ = draw(torch.arange(200), seed=0, size=32)
    others, _ = draw(torch.arange(200), seed=1, size=32)
    assert len(torch.unique(torch.cat([images, others]), dim=0)) == 400


@pytest.mark.parametrize("size", [16, 32, 64, 96, 224])
def test_every_size_gives_uint8_images_and_the_same_labels(size: int) -> None:
    indices = torch.arange(12)
    images, labels = draw(indices, seed=0, size=size)
    assert images.shape == (12, 3, size, size)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.equal(labels, draw(indices, seed=0, size=32, nuisances=OFF)[1])


def test_no_indices_give_an_empty_batch() -> None:
    images, labels = draw(torch.arange(0), seed=0, size=32)
    assert images.shape == (0, 3, 32, 32)
    assert labels.shape == (0,)


def test_labels_are_balanced() -> None:
    labels = draw(torch.arange(5000), seed=0, size=16, nuisances=OFF)[1]
    counts = torch.bincount(labels, minlength=len(CLASSES)).float()
    expected = 5000 / len(CLASSES)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == len(CLASSES)
    assert chi_squared < 27.9  # 99.9th percentile with 9 degrees of freedom


def test_large_images_shrink_to_small_ones() -> None:
    indices = torch.arange(40)
    small = draw(indices, seed=0, size=32)[0].float()
    large = draw(indices, seed=0, size=128)[0].float()
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 2.0


def test_without_nuisances_only_the_shape_differs() -> None:
    images, labels = draw(torch.arange(200), seed=0, size=32, nuisances=OFF)
    assert len(torch.unique(images, dim=0)) == len(CLASSES)
    assert all(len(torch.unique(of_class(images, labels, name), dim=0)) == 1 for name in CLASSES)


@pytest.mark.parametrize("name", NAMES)
def test_each_nuisance_alone_varies_the_images_more_with_more_strength(name: str) -> None:
    indices = torch.arange(40)
    plain = draw(indices, seed=0, size=32, nuisances=OFF)[0].float()
    weak = draw(indices, seed=0, size=32, nuisances=only(name, 0.3))[0].float()
    full, labels = draw(indices, seed=0, size=32, nuisances=only(name))
    assert 0 < (weak - plain).abs().mean() < (full.float() - plain).abs().mean()
    # A disc looks the same from all sides.
    others = full if name != "rotation" else full[labels > CLASSES.index("ring")]
    assert len(torch.unique(others, dim=0)) == len(others)


def test_without_color_all_instances_have_the_same_fill() -> None:
    pose = replace(OFF, scale=1.0, rotation=1.0, position=1.0)
    images, _ = draw(torch.arange(100), seed=0, size=64, nuisances=pose)
    assert (images.amax(dim=(2, 3)) == FILL).all()
    colored, _ = draw(torch.arange(100), seed=0, size=64, nuisances=replace(pose, color=1.0))
    assert len(torch.unique(colored.amax(dim=(2, 3)), dim=0)) > 90


def test_without_texture_fills_are_flat() -> None:
    plain, labels = draw(torch.arange(60), seed=0, size=64, nuisances=OFF)
    textured, _ = draw(torch.arange(60), seed=0, size=64, nuisances=only("texture"))
    inside = of_class(plain, labels, "disc")[0, 0] == FILL
    assert of_class(plain, labels, "disc")[:, 0][:, inside].float().std() == 0
    assert of_class(textured, labels, "disc")[:, 0][:, inside].float().std() > 10


def test_without_background_and_light_the_ground_is_plain() -> None:
    images, _ = draw(torch.arange(100), seed=0, size=64, nuisances=Nuisances(background=0.0, light=0.0))
    ground = (images == GROUND).all(dim=1).float().mean(dim=(1, 2))
    assert ground.min() > 0.2
    cluttered, _ = draw(torch.arange(100), seed=0, size=64, nuisances=Nuisances(light=0.0))
    assert (cluttered == GROUND).all(dim=1).float().mean() < 0.01


def test_without_scale_and_rotation_instances_only_move() -> None:
    images, labels = draw(torch.arange(300), seed=0, size=64, nuisances=only("position"))
    covered = (of_class(images, labels, "bar")[:, 0] > GROUND).float()
    assert (covered.amax(dim=2).sum(dim=1) < 64).any()  # bars lie flat: some rows are empty
    heights = [run for image in covered for run in _runs(image.amax(dim=1))]
    assert min(heights) <= math.ceil(2 * 0.3 * 0.46 * 32) + 1


def _runs(rows: Tensor) -> list[int]:
    return [len(run) for run in "".join("#" if row else " " for row in rows.tolist()).split()]


def test_without_position_four_instances_stand_in_the_quadrants() -> None:
    images, labels = draw(
        torch.arange(100), seed=0, size=64, nuisances=Nuisances(position=0.0, background=0.0, light=0.0)
    )
    quadrants = torch.tensor([[16, 16], [16, 48], [48, 16], [48, 48]])
    discs = of_class(images, labels, "disc")
    centers = discs[:, :, quadrants[:, 0], quadrants[:, 1]]  # (n, 3, 4)
    assert (centers != GROUND).any(dim=1).all()


def test_edges_are_antialiased_to_the_true_area() -> None:
    images, labels = draw(torch.arange(100), seed=0, size=32, nuisances=OFF)
    disc = of_class(images, labels, "disc")[0, 0].float()
    between = (disc > GROUND) & (disc < FILL)
    assert 0.03 < between.float().mean() < 0.3
    cover = ((disc - GROUND) / (FILL - GROUND)).mean()
    assert cover == pytest.approx(math.pi * (0.8 * 0.46) ** 2, rel=0.01)


def test_raw_pixels_tell_little_of_the_label() -> None:
    images, labels = draw(torch.arange(2500), seed=0, size=16)
    pixels = torch.cat([images.flatten(1).double() / 255 - 0.5, torch.ones(2500, 1, dtype=torch.double)], dim=1)
    train, test = pixels[:2000], pixels[2000:]
    targets = torch.nn.functional.one_hot(labels[:2000], len(CLASSES)).double()
    ridge = torch.linalg.solve(train.T @ train + 30 * torch.eye(769, dtype=torch.double), train.T @ targets)
    assert ((test @ ridge).argmax(dim=1) == labels[2000:]).double().mean() < 0.25


@pytest.mark.parametrize("strength", [-0.1, 1.5, math.nan])
def test_a_strength_outside_0_to_1_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"texture is .* must be from 0 .* to 1"):
        Nuisances(texture=strength)


def test_a_tiny_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size is 8, but .* from 16 pixels on"):
        draw(torch.arange(2), seed=0, size=8)


@pytest.mark.parametrize("indices", [torch.zeros(2, 2, dtype=torch.int64), torch.arange(2.0), torch.tensor(3)])
def test_indices_other_than_a_vector_of_int64_are_refused(indices: Tensor) -> None:
    with pytest.raises(ValueError, match="indices must be a vector of int64"):
        draw(indices, seed=0, size=32)
